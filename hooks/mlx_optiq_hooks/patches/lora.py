"""``mlx_lm.lora``: ranks of their own for the layers, and adapters that load everywhere."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..commands import lora as lora_options
from ..engine import session
from ..engine.patch import Patch, bind, of


def run(wrapped, instance, args, kwargs):
    call = bind(wrapped, args, kwargs)
    given = call["args"]
    asked = any(key.startswith("optiq_") for key in vars(given))
    if session.current() is None and not asked:
        return wrapped(*args, **kwargs)
    running = session.running()
    if running is None or running.command != "lora":
        # Called from Python, with our keys among mlx-lm's.
        with session.session("lora") as entry:
            return _run(wrapped, call, entry)
    return _run(wrapped, call, running)


def _run(wrapped, call, running):
    from mlx_optiq_ext import distributed

    from ..installation import gate

    given = call["args"]
    on_command_line = lora_options.wanted(running.options)
    options = lora_options.merged(running.options, given)
    if options is None:
        return wrapped(**call)
    gate().require("lora")
    distributed.size()  # from here on all ranks fail together
    lora_options.check_training(options, on_command_line, given)
    distributed.agree(settings={**vars(given), **vars(options)})
    running.options = options
    return wrapped(**call)


def train_model(wrapped, instance, args, kwargs):
    running = session.current()
    if running is None or running.command != "lora":
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext import lora

    call, options = bind(wrapped, args, kwargs), running.options
    assert options is not None
    given = call["args"]
    _compare(given.model, call["train_set"], call["valid_set"])
    resume = given.resume_adapter_file
    # Copies: mlx-lm's defaults live on in its module, and our ranks must not leak into them.
    call["args"] = SimpleNamespace(
        **{
            **vars(given),
            "lora_parameters": dict(given.lora_parameters),
            "resume_adapter_file": None,
        }
    )
    running.results["training"] = lora.Request(
        model=given.model,
        folder=Path(given.adapter_path),
        original=None if options.original is None else _loader(options.original),
        samples=lambda: _samples(call["train_set"], given),
        resume=None if resume is None else Path(resume),
        scaling=options.rank_scaling or lora.CONSTANT,
        compiled=not options.no_compile,
    )
    layer = type(call["model"].layers[0])
    forward = layer.__call__
    try:
        return wrapped(**call)
    finally:
        # Gradient checkpointing changes the class for good, and would again next time.
        layer.__call__ = forward
        running.results.pop("training", None)
        running.results.pop("checkpoint", None)


def _compare(model, *sets):
    """Refuse to train when the ranks do not have the same model and data."""
    from mlx_optiq_ext import distributed, lora, weights

    if distributed.size() == 1:
        return
    digests = [lora.digest(each[i] for i in range(len(each))) for each in sets]
    names = ("training data", "validation data")
    folder = weights.local_folder(model)
    distributed.compare(
        model=weights.model_digest(folder), **dict(zip(names, digests, strict=True))
    )


#: How many training texts weight the residual, and how long they may be.
SAMPLES, LENGTH = 16, 512


def _samples(dataset, args):
    """Tokens of some training texts, spread over the data set."""
    from mlx_lm.tuner.datasets import CacheDataset

    cached = CacheDataset(dataset)
    step = max(1, len(cached) // SAMPLES)
    found = []
    for index in range(0, len(cached), step)[:SAMPLES]:
        item: Any = cached[index]
        tokens = item[0] if len(item) == 2 else item
        found.append(list(tokens)[: min(LENGTH, args.max_seq_length)])
    return [tokens for tokens in found if tokens]


def _loader(name):
    def load():
        from mlx_lm.utils import load

        return load(name, lazy=True)[0]

    return load


PATCHES = (
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
        why="says what the running training was asked for",
        upstream="none: one rank for all layers",
        wrapper=train_model,
        uses=of("mlx_lm.tuner.datasets", "CacheDataset.__getitem__", "CacheDataset.__len__"),
    ),
)
