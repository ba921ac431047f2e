"""Real PEFT loads what is trained here, and the other way round.

Needs torch, transformers and peft, in the running Python or the one that MLX_OPTIQ_PEFT_PYTHON
names: ``nox -f compat/noxfile.py -s peft`` brings one. What it found is recorded in
``tests/data/peft``, which the other tests of this folder always use.
"""

import os
import subprocess
import sys
from pathlib import Path

import mlx_lm
import numpy as np
import pytest

from .conftest import logits
from .real_peft import SPECS
from .test_loading import in_float32  # noqa: F401 - a fixture

pytestmark = pytest.mark.peft

SCRIPT = Path(__file__).with_name("real_peft.py")


@pytest.fixture(scope="session")
def real_peft():
    """Runs ``real_peft.py``."""

    def real_peft(*arguments):
        python = os.environ.get("MLX_OPTIQ_PEFT_PYTHON") or sys.executable
        # A preloaded BLAS is MLX's business; torch brings its own.
        left_out = ("LD_PRELOAD", "PYTHONPATH")
        surroundings = {k: v for k, v in os.environ.items() if k not in left_out}
        command = [python, str(SCRIPT), *map(str, arguments)]
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return real_peft


def agree(real_peft, model, adapter, out, tokens):
    """How far PEFT's logits and ours differ, and how far the adapter moves them."""
    real_peft("logits", model, adapter, out)
    ours = np.array(logits(mlx_lm.load(str(model), adapter_path=str(adapter))[0], tokens))
    plain = np.array(logits(mlx_lm.load(str(model))[0], tokens))
    theirs = np.load(out)
    return np.abs(ours - theirs).max(), np.abs(plain - theirs).max()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_loads_what_is_trained_here(
    real_peft,
    lora,
    packed,
    in_float32,  # noqa: F811
    tmp_path,
    tokens,
    kind,
):
    # Trained on the packed model for its mixed ranks; the paths are the plain model's too.
    flags = ("--optiq-rank-scaling", "by_bits", "--learning-rate", 3e-3)
    lora(packed, tmp_path / "a", *flags, "--fine-tune-type", kind, iters=4)
    difference, moved = agree(real_peft, in_float32, tmp_path / "a", tmp_path / "l.npy", tokens)
    assert moved > 0.1
    assert difference < 1e-3


@pytest.mark.parametrize("spec", SPECS)
def test_what_peft_makes_loads_here(real_peft, in_float32, tmp_path, tokens, spec):  # noqa: F811
    real_peft("make", in_float32, tmp_path / "a", spec)
    difference, moved = agree(real_peft, in_float32, tmp_path / "a", tmp_path / "l.npy", tokens)
    assert moved > 0.1
    assert difference < 1e-3


def test_what_peft_trains_loads_here(real_peft, in_float32, tmp_path, tokens):  # noqa: F811
    real_peft("train", in_float32, tmp_path / "a")
    difference, moved = agree(real_peft, in_float32, tmp_path / "a", tmp_path / "l.npy", tokens)
    assert moved > 0.1
    assert difference < 1e-3


@pytest.mark.shared
def test_a_larger_model_agrees(real_peft, shared, lora, tmp_path, tokens):
    model = shared / "models" / "ref-24m"
    original = tmp_path / "model"
    code = (
        "import sys, mlx.core as mx, mlx_lm, shutil, pathlib\n"
        "from mlx_lm.utils import save_model\n"
        "model = mlx_lm.load(sys.argv[1])[0]; model.set_dtype(mx.float32)\n"
        "save_model(sys.argv[2], model)\n"
        "[shutil.copy(p, sys.argv[2]) for p in pathlib.Path(sys.argv[1]).iterdir()"
        " if 'safetensors' not in p.name]\n"
    )
    subprocess.run([sys.executable, "-c", code, str(model), str(original)], check=True)
    real_peft("make", original, tmp_path / "a", "mixed")
    difference, moved = agree(real_peft, original, tmp_path / "a", tmp_path / "l.npy", tokens)
    assert moved > 0.1
    assert difference < 1e-3
    lora(original, tmp_path / "b", "--optiq-rank-scaling", "constant", "--learning-rate", 3e-3)
    difference, moved = agree(real_peft, original, tmp_path / "b", tmp_path / "m.npy", tokens)
    assert moved > 0.05
    assert difference < 1e-3
