"""``mlx_lm.server``: the KV plan of the served model."""

import _thread
import os
import signal
import sys
import threading

from mlx_optiq_ext.errors import OptiqError

from . import kv_options, session
from .patch import Patch


def load(wrapped, instance, args, kwargs):
    running = session.current()
    if running is None or session.kv_plan(running) is None:
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext import kv

    try:
        result = wrapped(*args, **kwargs)
        model = instance.model
        if model is not None and kv.mounted_on(model) is None:
            kv_options.mount(model, running)
    except OptiqError as error:
        starting = not running.results.get("kv") and instance.cli_args.model is not None
        instance.model, instance.model_key = None, None
        if starting:
            end(running, error)
        raise
    mounted = None if model is None else kv.mounted_on(model)
    if mounted is not None:
        # A CacheList says that it merges, whatever is in it.
        instance.is_batchable = instance.is_batchable and mounted.mergeable
    return result


def end(running: session.Session, error: OptiqError) -> None:
    """End the command on the main thread with an error of the generation thread."""
    if threading.current_thread() is threading.main_thread():
        return
    running.results["fatal"] = error
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _thread.interrupt_main()
    else:  # a background job ignores interrupts
        print(f"mlx_lm.server: error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    # mlx-lm logs any Exception with its traceback.
    raise SystemExit(2) from error


PATCHES = (
    Patch(
        "mlx_lm.server:ModelProvider.load",
        feature="kv",
        why="gives the served model its KV plan",
        upstream="none: --kv-bits is one width, sequential only (server.py)",
        wrapper=load,
    ),
)
