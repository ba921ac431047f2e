"""The tiny model in float32, and adapters of every form on it."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.utils import quantize_model, save_model

from .real_peft import TOKENS

PATH = "model.layers.{}.self_attn.{}_proj"
BY_BITS = ("--optiq-rank-scaling", "by_bits")


def load_tensors(path) -> dict[str, mx.array]:
    """The tensors of a safetensors file."""
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    mx.eval(tensors)  # read lazily: the file may be written to next
    return tensors


@pytest.fixture
def exact(tiny):
    """The tiny model, freshly loaded in float32."""
    model = mlx_lm.load(str(tiny))[0]
    model.set_dtype(mx.float32)
    return model


@pytest.fixture(scope="session")
def recorded() -> Path:
    """Adapters made by real PEFT on the tiny model, and the logits it had with them."""
    return Path(__file__).resolve().parents[1] / "data" / "peft"


@pytest.fixture
def stored(tmp_path):
    """Writes an adapter in mlx-lm's form: ``stored(ranks, scale=..., notes=...)``."""

    def stored(ranks, *, scale=4.0, notes=None, name="adapter"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        tensors = {}
        mx.random.seed(1)
        for path, rank in ranks.items():
            out = 256 if "q_proj" in path else 128
            tensors[f"{path}.lora_a"] = mx.random.normal((128, rank)) * 0.05
            tensors[f"{path}.lora_b"] = mx.random.normal((rank, out)) * 0.05
        mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
        parameters = {"rank": max(ranks.values()), "scale": scale, "dropout": 0.0}
        config = {
            "fine_tune_type": "lora",
            "num_layers": -1,
            "lora_parameters": {**parameters, "keys": sorted({p[15:] for p in ranks})},
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        if notes is not None:
            (folder / "optiq_lora_config.json").write_text(json.dumps(notes))
        return folder

    return stored


@pytest.fixture(scope="session")
def tokens():
    """The tokens that `real_peft` uses."""
    return mx.array(TOKENS)


#: Bits of each kind of layer in the `packed` model.
BITS = {"q_proj": 4, "k_proj": 4, "v_proj": 8, "down_proj": 6}


@pytest.fixture(scope="session")
def packed(tiny, tmp_path_factory) -> Path:
    """The tiny model with precision of its own for each layer and a measured KL, in float32."""
    folder = tmp_path_factory.mktemp("models") / "packed"
    model, _, config = cast(Any, mlx_lm.load(str(tiny), return_config=True))
    model.set_dtype(mx.float32)

    def predicate(path, module):
        if not hasattr(module, "to_quantized") or "embed" in path:
            return False
        return {"bits": BITS.get(path.rpartition(".")[2], 3), "group_size": 32}

    model, config = quantize_model(model, config, 64, 4, quant_predicate=predicate)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    per_layer = {
        f"model.layers.{n}.self_attn.{kind}_proj": {"bits": 4, "group_size": 32, "kl": kl}
        for n in range(6)
        for kind, kl in (("q", 0.004 + 0.001 * n), ("v", 0.01))
    }
    (folder / "optiq_metadata.json").write_text(
        json.dumps({"per_layer": per_layer, "calibration": {"source": "sampled from the model"}})
    )
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A data set of the tiny model's kind of text."""
    folder = tmp_path_factory.mktemp("data")
    lines = (Path(__file__).resolve().parents[1] / "data" / "calibration.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    texts = [json.dumps({"text": f"{row['question']} {row['answer']}"}) for row in rows]
    for name, part in (("train", texts[:32]), ("valid", texts[32:36]), ("test", texts[36:40])):
        (folder / f"{name}.jsonl").write_text("\n".join(part))
    return folder


@pytest.fixture
def lora(monkeypatch, data):
    """Runs ``mlx_lm.lora`` in this process: a short training with small batches.

    The step is not compiled unless asked for: compiling takes longer than these trainings.
    """

    def lora(model, folder, *flags, compiled=False, iters=2, train=True):
        short = ["--data", data, "--iters", iters, "--batch-size", 1, "--max-seq-length", 48]
        short += ["--steps-per-report", 1, "--val-batches", 1, "--num-layers", -1, "--train"]
        short += [] if compiled else ["--optiq-no-compile"]
        command = ["mlx_lm.lora", "--model", model, "--adapter-path", folder]
        command += [*(short if train else ["--data", data]), *flags]
        monkeypatch.setattr(sys, "argv", [str(each) for each in command])
        importlib.import_module("mlx_lm.lora").main()

    return lora


def logits(model, tokens):
    """A model's logits, evaluated."""
    found = model(tokens)
    mx.eval(found)
    return found


def error_of(capsys, call, *args, **kwargs) -> str:
    """The last line that a command prints which ends with status 2."""
    with pytest.raises(SystemExit) as ended:
        call(*args, **kwargs)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "error:" in lines[-1]
    return lines[-1]
