"""Fixtures of the folders that measure a small random model; their conftest imports them."""

from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models import qwen3
from toy_qwen3 import TEXT, write_toy

from mlx_optiq_ext.weights import Problem, Request, calibrated


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A folder with a random two-layer model."""
    return write_toy(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture
def loaded(toy):
    """The toy model and its tokenizer, in float32."""
    model, tokenizer = mlx_lm.load(str(toy))[:2]
    model.set_dtype(mx.float32)
    return model, tokenizer


@pytest.fixture
def text(tmp_path) -> Path:
    """A calibration file of a few hundred tokens."""
    path = tmp_path / "calibration.txt"
    path.write_text(TEXT * 12)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Measurements of a test stay with it."""
    monkeypatch.setenv("MLX_OPTIQ_EXT_CACHE", str(tmp_path / "cache"))


#: Of a conversion that shall not take the time of a refinement.
PLAIN = ("--optiq-effort", "plan")


def quiet(**settings) -> Request:
    """A request that shows nothing."""
    settings = {"effort": "plan", "progress": False, "say": lambda line: None, **settings}
    return Request(**settings)


def unmeasured(model, tokenizer, **settings) -> Problem:
    """A model with its calibration sequences, not measured."""
    return calibrated(model, tokenizer, quiet(**settings))


def without_gradients(monkeypatch, error: str | None = None) -> None:
    """Make Qwen3's backward pass fail: for want of MLX's gradient, or with an error of memory."""
    forward = qwen3.MLP.__call__

    def lacking(self, x):
        out = forward(self, x)
        return out.at[mx.array([0])].multiply(mx.ones((1, *out.shape[1:])))

    @mx.custom_function
    def failing(x):
        return x + 0

    @failing.vjp
    def raises(*_):
        raise RuntimeError(error)

    changed = lacking if error is None else lambda self, x: failing(forward(self, x))
    monkeypatch.setattr(qwen3.MLP, "__call__", changed)
