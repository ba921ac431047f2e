"""``mlx_lm.server``: what its command line asks for and cannot be done ends it.

It loads its model in the thread that generates. Stock logs an error there and goes on without it.
"""

import _thread
import os
import signal
import sys
import threading

from mlx_optiq_ext.errors import OptiqError

from . import session
from .patch import Patch


def load(wrapped, instance, args, kwargs):
    running = session.running()
    if running is None:
        return wrapped(*args, **kwargs)
    try:
        result = wrapped(*args, **kwargs)
    except OptiqError as error:
        instance.model, instance.model_key = None, None
        if "serving" not in running.results and instance.cli_args.model is not None:
            _end(running, error)
        raise
    running.results["serving"] = True
    return result


def _end(running: session.Session, error: OptiqError) -> None:
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
        feature="flags",
        why="ends the server when what its command line asks for cannot be done",
        upstream="none: stock serves without its model then (server.py)",
        wrapper=load,
    ),
)
