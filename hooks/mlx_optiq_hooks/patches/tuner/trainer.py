"""``mlx_lm.tuner.trainer``: complete checkpoints, and an optional uncompiled training step."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from ...commands import lora as command
from ...engine import session
from ...engine.patch import Patch, bind, of


class _View(ModuleType):
    """``mlx.core`` as the trainer sees it during a training with our options."""

    def __init__(self, real: Any, run: command.Run, compiled: bool):
        super().__init__("mlx.core", real.__doc__)
        self._real = real
        self._run = run
        if not compiled:
            self.compile = lambda function, *args, **kwargs: function

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def save_safetensors(self, file, arrays, metadata=None):
        self._run.save(Path(file), arrays)


def train(wrapped, instance, args, kwargs):
    run = session.state(command.Run)
    if run is None or run.request is None or run.checkpoint is None:
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext import lora

    module: Any = importlib.import_module("mlx_lm.tuner.trainer")
    real, call = module.mx, bind(wrapped, args, kwargs)
    settings = call["args"]
    lora.check_trained_tokens(call["train_dataset"], settings.batch_size, settings.max_seq_length)
    call["loss"] = lora.over_all_tokens(call.get("loss", module.default_loss))
    # The trainer looks up mx.compile and mx.save_safetensors each time it trains.
    module.mx = _View(real, run, run.request.compiled)
    try:
        return wrapped(**call)
    finally:
        module.mx = real


PATCHES = (
    Patch(
        "mlx_lm.tuner.trainer:train",
        feature="lora",
        why="saves what stock mlx-lm and PEFT load, and weights all processes' tokens alike",
        upstream="none: checkpoints are written in place; each process's mean loss counts alike",
        wrapper=train,
        uses=of("mlx_lm.tuner.trainer", "mx", "mx.compile", "mx.save_safetensors", "default_loss"),
    ),
)
