"""What scales and biases are stored in."""

import json

import mlx.core as mx
import pytest
from toy_fixtures import PLAIN
from toy_qwen3 import write_toy


@pytest.fixture
def wide(tmp_path):
    """A checkpoint in float32."""
    model = write_toy(tmp_path / "wide")
    path = model / "model.safetensors"
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    arrays = {name: array.astype(mx.float32) for name, array in arrays.items()}
    mx.eval(arrays)
    mx.save_safetensors(str(path), arrays, metadata={"format": "mlx"})
    config = json.loads((model / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        config.pop(name, None)
    (model / "config.json").write_text(json.dumps(config))
    return model


def stored(folder):
    arrays = mx.load(str(folder / "model.safetensors"))
    assert isinstance(arrays, dict)
    return {array.dtype for name, array in arrays.items() if name.endswith((".scales", ".biases"))}


@pytest.mark.parametrize(
    ("words", "dtype"),
    [((), mx.bfloat16), (("--dtype", "float32"), mx.float32), (("--dtype", "float16"), mx.float16)],
)
def test_a_float32_checkpoint_gets_scales_of_16_bits(command, wide, text, tmp_path, words, dtype):
    given = ("--hf-path", wide, "--mlx-path", tmp_path / "out", "--optiq-calibration", text)
    done = command("convert", *given, *PLAIN, "--optiq-budget", 6, "--optiq-bits", "4,8", *words)
    assert done.status == 0, done.err
    assert stored(tmp_path / "out") == {dtype}
    assert ("stored in bfloat16 (--dtype float32 keeps them)" in done.out) == (not words)


def test_a_config_that_names_float32_counts(command, wide, text, tmp_path):
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    given = ("--hf-path", wide, "--mlx-path", tmp_path / "out", "--optiq-calibration", text)
    done = command("convert", *given, *PLAIN, "--optiq-budget", 6, "--optiq-bits", "4,8")
    assert done.status == 0, done.err
    assert stored(tmp_path / "out") == {mx.bfloat16}
