"""``mlx_lm.server``: the model it serves, and its KV plan.

The server loads its model in the thread that generates. Stock logs an error there and goes on
without a model. If what failed is what our options asked for, the server ends instead.
"""

import _thread
import functools
import os
import signal
import sys
import threading
from dataclasses import dataclass

from mlx_optiq_ext.errors import OptiqError

from ...commands import kv as command
from ...commands import server
from ...engine import session
from ...engine.patch import Patch, of


@dataclass
class Loading:
    """State of a server that loads its model.

    Attributes:
        inside: Whether `ModelProvider.load` is running, in another feature's wrapper.
        done: Whether a model was loaded once.
    """

    inside: bool = False
    done: bool = False


def ending(load):
    """Decorate a wrapper of ``ModelProvider.load``: if our part of it fails, the command ends.

    Once a load has succeeded, a later failure is an error of its request only. Each
    feature wraps ``load``, and the outermost wrapper acts.
    """

    @functools.wraps(load)
    def ended(wrapped, instance, args, kwargs):
        running = session.running()
        if running is None:
            return load(wrapped, instance, args, kwargs)
        loading = running.state(Loading)
        if loading is None:
            loading = Loading()
            running.keep(loading)
        if loading.inside:
            return load(wrapped, instance, args, kwargs)
        loading.inside = True
        try:
            result = load(wrapped, instance, args, kwargs)
        except OptiqError as error:
            instance.model, instance.model_key = None, None
            if not loading.done and instance.cli_args.model is not None:
                _end(running, error)
            raise
        finally:
            loading.inside = False
        loading.done = True
        return result

    return ended


def _end(running: session.Session, error: OptiqError) -> None:
    """End the command on the main thread with an error of the generation thread."""
    if threading.current_thread() is threading.main_thread():
        return
    from mlx_optiq_ext import distributed

    if distributed.size() > 1:
        # All processes end at once, each with the reason; the launcher ends those that are late.
        distributed.leave(f"mlx_lm.server: {error}")
    running.failure = error
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _thread.interrupt_main()
    else:  # a background job ignores interrupts
        try:
            print(f"mlx_lm.server: error: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(2)
    # mlx-lm logs any Exception with its traceback.
    raise SystemExit(2) from error


@ending
def load(wrapped, instance, args, kwargs):
    with server.loading(instance.cli_args.adapter_path):
        return wrapped(*args, **kwargs)


@ending
def load_with_plan(wrapped, instance, args, kwargs):
    result = wrapped(*args, **kwargs)
    run, model = session.state(command.Run), instance.model
    if run is None or model is None:
        return result
    from mlx_optiq_ext import kv

    if kv.mounted_on(model) is None:
        command.mount(model, run)
    mounted = kv.mounted_on(model)
    if mounted is not None:
        # A CacheList claims to merge even if its members cannot.
        instance.is_batchable = instance.is_batchable and mounted.mergeable
    return result


PROVIDER = of("mlx_lm.server", *(f"ModelProvider.{n}" for n in ("cli_args", "model", "model_key")))

PATCHES = (
    Patch(
        "mlx_lm.server:ModelProvider.load",
        feature="lora",
        why="ends the server when its adapter cannot be loaded",
        upstream="none: stock serves without a model then (server.py)",
        wrapper=load,
        uses=PROVIDER,
    ),
    Patch(
        "mlx_lm.server:ModelProvider.load",
        feature="kv",
        why="gives the served model its KV plan",
        upstream="none: --kv-bits is one width, sequential only (server.py)",
        wrapper=load_with_plan,
        uses=(*PROVIDER, *of("mlx_lm.server", "ModelProvider.is_batchable")),
    ),
)
