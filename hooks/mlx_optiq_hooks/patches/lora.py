"""``mlx_lm.lora``: each layer has its own rank, and adapters load everywhere."""

from types import SimpleNamespace

from ..commands import lora as command
from ..engine import session
from ..engine.patch import Patch, bind, of


def keys(wrapped, instance, args, kwargs):
    given = bind(wrapped, args, kwargs)["args"]
    if command.keys_of_file(vars(given)):
        from ..installation import gate

        gate().require("lora")
    return wrapped(*args, **kwargs)


def run(wrapped, instance, args, kwargs):
    call = bind(wrapped, args, kwargs)
    given = call["args"]
    if session.current() is None and not command.keys_of_file(vars(given)):
        command.check_stock(given)
        return wrapped(*args, **kwargs)
    running = session.running()
    if running is not None and running.command == "lora":
        command.start(running, given)
        return wrapped(**call)
    # Called from Python, with our keys among mlx-lm's.
    with session.opened("lora") as running:
        command.start(running, given)
        return wrapped(**call)


def train_model(wrapped, instance, args, kwargs):
    run = session.state(command.Run)
    if run is None:
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext import lora

    call = bind(wrapped, args, kwargs)
    given = call["args"]
    lora.check_same_start(given.model, call["train_set"], call["valid_set"])
    run.request = command.request(run.options, given, call["train_set"])
    # Copies, because mlx-lm's defaults are shared and our ranks must not change them.
    own = {"lora_parameters": dict(given.lora_parameters), "resume_adapter_file": None}
    call["args"] = SimpleNamespace(**{**vars(given), **own})
    layer = type(call["model"].layers[0])
    forward = layer.__call__
    try:
        return wrapped(**call)
    finally:
        # Gradient checkpointing changes the class; without this it would be wrapped again.
        layer.__call__ = forward
        run.request = run.checkpoint = None


PATCHES = (
    Patch(
        "mlx_lm.lora:run",
        feature="flags",
        why="refuses our keys of the YAML file where nothing would read them",
        upstream="none: unknown keys of the file are kept",
        wrapper=keys,
    ),
    Patch(
        "mlx_lm.lora:run",
        feature="lora",
        why="reads our options from the YAML file too",
        upstream="none: unknown keys of the file are kept",
        wrapper=run,
    ),
    Patch(
        "mlx_lm.lora:train_model",
        feature="lora",
        why="passes the options to the running training",
        upstream="none: one rank for all layers",
        wrapper=train_model,
        uses=of("mlx_lm.tuner.datasets", "CacheDataset.__getitem__", "CacheDataset.__len__"),
    ),
)
