"""The stock command with a budget, on multimodal checkpoints."""

import json
import shutil
from typing import Any

import mlx.core as mx
import pytest
from toy_fixtures import PLAIN

from .checkpoints import KINDS, PROCESSORS, text_class

KIND = {kind.name: kind for kind in KINDS}
TEXT = "There are 12 apples in each box and Mia buys 7 boxes. How many apples are there? "
LOAD = """
import sys, mlx_lm
model = mlx_lm.load(sys.argv[1])[0]
assert "mlx_optiq_hooks" not in sys.modules
print(type(model).__module__)
"""


@pytest.fixture
def convert(run, tmp_path):
    """Runs the command on a checkpoint with a few words of calibration text."""
    calibration = tmp_path / "calibration.txt"
    calibration.write_text(TEXT * 12)

    def convert(source, *options, env=None):
        paths = ("--hf-path", source, "--mlx-path", tmp_path / "out")
        done = run("python", "-m", "mlx_lm", "convert", *paths, *options, env=env)
        return done, tmp_path / "out"

    return lambda source, *options, **more: convert(
        source, *(option if option != "TEXT" else calibration for option in options), **more
    )


@pytest.mark.parametrize("name", ["gemma4_e4b", "qwen3_5_moe", "qwen3_vl_moe"])
def test_a_budget_makes_a_text_model_for_bare_mlx_lm(name, published, convert, run):
    kind = KIND[name]
    options = (*PLAIN, "--optiq-budget", "6", "--optiq-calibration", "TEXT")
    done, out = convert(published(kind), *options)
    assert done.returncode == 0, done.stderr
    assert "Text only, as " in done.stdout
    loaded = run("python", "-c", LOAD, out, env={"MLX_OPTIQ_EXT": "0"}, check=True)
    assert loaded.stdout.split()[-1] == text_class(kind).__module__
    config = json.loads((out / "config.json").read_text())
    assert not [key for key in config if "vision" in key or "image" in key or "audio" in key]
    assert not [file for file in PROCESSORS if (out / file).exists()]
    metadata = json.loads((out / "optiq_metadata.json").read_text())
    (entry,) = metadata["post_processing"]
    assert "video_token_id" in entry["dropped_keys"]
    assert metadata["per_layer"].keys() >= {
        path for path, value in config["quantization"].items() if isinstance(value, dict)
    }


def test_keeping_the_modalities_converts_as_mlx_lm_does(published, convert, run):
    options = (*PLAIN, "--optiq-budget", "6", "--optiq-calibration", "TEXT")
    done, out = convert(published(KIND["gemma3"]), *options, "--optiq-keep-unused-modalities")
    assert done.returncode == 0, done.stderr
    assert "Text only" not in done.stdout
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "gemma3"
    assert config["image_token_index"] == 262144
    loaded = run("python", "-c", LOAD, out, env={"MLX_OPTIQ_EXT": "0"}, check=True)
    assert loaded.stdout.split()[-1] == "mlx_lm.models.gemma3"
    assert json.loads((out / "optiq_metadata.json").read_text())["post_processing"] == []


def test_without_our_flags_the_command_writes_the_same_bytes(published, convert, run, tmp_path):
    source = published(KIND["gemma3"])
    done, out = convert(source, "-q", "--q-group-size", "32")
    assert done.returncode == 0, done.stderr
    stock = tmp_path / "stock"
    paths = ("--hf-path", source, "--mlx-path", stock, "-q", "--q-group-size", "32")
    run("python", "-m", "mlx_lm", "convert", *paths, env={"MLX_OPTIQ_EXT": "0"}, check=True)
    for name in ("config.json", "model.safetensors"):
        assert (out / name).read_bytes() == (stock / name).read_bytes()


def test_the_opt_out_alone_is_refused(tiny, convert):
    done, out = convert(tiny, "--optiq-keep-unused-modalities")
    assert done.returncode == 2
    assert "--optiq-keep-unused-modalities needs --optiq-budget" in done.stderr
    assert not out.exists()


def test_an_unknown_multimodal_model_is_refused_before_it_is_loaded(tiny, convert, tmp_path):
    source = tmp_path / "unknown"
    shutil.copytree(tiny, source)
    config = json.loads((source / "config.json").read_text()) | {"vision_config": {"depth": 3}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").write_bytes(b"not even weights")
    done, out = convert(source, *PLAIN, "--optiq-budget", "6", "--optiq-calibration", "TEXT")
    assert done.returncode == 2, done.stderr
    assert "qwen3 cannot be made text-only" in done.stderr
    assert "--optiq-keep-unused-modalities" in done.stderr
    assert not out.exists()


def test_a_text_model_read_layer_by_layer_is_the_same(published, convert, tmp_path):
    written = []
    for switch in "01":
        options = (*PLAIN, "--optiq-budget", "6", "--optiq-calibration", "TEXT")
        cache = str(tmp_path / f"cache{switch}")
        environment = {"MLX_OPTIQ_EXT_STREAM": switch, "MLX_OPTIQ_EXT_CACHE": cache}
        done, out = convert(published(KIND["gemma4_e4b"]), *options, env=environment)
        assert done.returncode == 0, done.stderr
        assert ("layer by layer" in done.stdout) == (switch == "1")
        assert "Text only, as " in done.stdout
        weights: dict[str, Any] = {}
        for shard in out.glob("model*.safetensors"):
            loaded: Any = mx.load(str(shard))
            weights.update(loaded)
        written.append({name: array.tolist() for name, array in weights.items()})
        shutil.rmtree(out)
    assert written[0] == written[1]
