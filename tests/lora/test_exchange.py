"""``--optiq-export-peft`` both ways, and ``--optiq-info``."""

import json
import shutil

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_optiq_ext import OptiqError
from mlx_optiq_ext.lora import convert, read_adapter, table
from mlx_optiq_ext.lora.forms.peft_writing import Naming

from .conftest import PATH, load_tensors, logits
from .test_loading import in_float32  # noqa: F401 - a fixture

Q, V = PATH.format(0, "q"), PATH.format(1, "v")


def test_what_real_peft_loaded_is_what_we_still_write(recorded, tmp_path):
    # `ours` was written here, and real PEFT computed its logits with it.
    folder = shutil.copytree(recorded / "ours", tmp_path / "copy")
    (folder / "adapter_model.safetensors").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    own = ("fine_tune_type", "num_layers", "lora_parameters", "model")
    stock = {key: config[key] for key in own}
    (folder / "adapter_config.json").write_text(json.dumps(stock))
    said = convert(folder)
    assert "adapter_model.safetensors" in said
    assert json.loads((folder / "adapter_config.json").read_text()) == config
    before, after = (
        load_tensors(each / "adapter_model.safetensors") for each in (recorded / "ours", folder)
    )
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)


def test_our_adapter_computes_what_real_peft_computed(in_float32, recorded, tokens):  # noqa: F811
    folder = recorded / "ours"
    assert len({layer.rank for layer in read_adapter(folder).layers.values()}) > 1
    model = mlx_lm.load(str(in_float32), adapter_path=str(folder))[0]
    expected = np.load(folder / "logits.npy")
    plain = logits(mlx_lm.load(str(in_float32))[0], tokens)
    assert np.abs(np.array(plain) - expected).max() > 0.1
    assert np.abs(np.array(logits(model, tokens)) - expected).max() < 1e-3


@pytest.mark.parametrize("name", ["mixed", "rslora", "dora"])
def test_a_peft_adapter_becomes_one_for_stock(
    in_float32,  # noqa: F811
    recorded,
    tokens,
    tmp_path,
    run,
    name,
):
    folder = shutil.copytree(recorded / name, tmp_path / "copy")
    run("mlx_lm.lora", "--optiq-export-peft", folder, check=True)
    code = (
        "import mlx.core as mx, mlx_lm, sys\n"
        "model = mlx_lm.load(sys.argv[1], adapter_path=sys.argv[2])[0]\n"
        f"mx.save(sys.argv[3], model(mx.array({tokens.tolist()})))\n"
    )
    out, stock = tmp_path / "stock.npy", {"MLX_OPTIQ_EXT": "0"}
    run("python", "-c", code, in_float32, folder, out, env=stock, check=True)
    expected = np.load(recorded / name / "logits.npy")
    assert np.abs(np.load(out) - expected).max() < 1e-3


def test_both_forms_are_not_written_again(recorded):
    with pytest.raises(OptiqError, match="both forms"):
        convert(recorded / "ours")


def test_a_failed_conversion_leaves_the_folder(recorded, tmp_path, monkeypatch):
    folder = shutil.copytree(recorded / "mixed", tmp_path / "copy")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args):
        raise RuntimeError("[write] no space left")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(OptiqError, match="disk space"):
        convert(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_vision_language_models_are_named_as_transformers_does():
    naming = Naming.of({"architectures": ["Gemma3ForConditionalGeneration"]}, ())
    assert naming.path("language_model.model.layers.0.q") == "model.language_model.layers.0.q"
    assert naming.path("language_model.lm_head") == "lm_head"
    assert naming.path("model.layers.0.q") == "model.layers.0.q"
    text = Naming.of({"architectures": ["Qwen3_5ForCausalLM"]}, ())
    assert text.path("language_model.model.layers.0.q") == "model.layers.0.q"


def test_the_table_shows_each_layer(run, stored):
    notes = {"ranks": {Q: 2, V: 5}, "bits": {Q: 4, V: 8}, "scaling": "by_bits", "rank": 3}
    folder = stored({Q: 2, V: 5}, notes=notes)
    adapter = read_adapter(folder)
    lines = table(adapter).splitlines()
    row = next(line for line in lines if line.startswith(Q)).split()
    layer = adapter.layers[Q]
    length = mx.linalg.norm(layer.scale * layer.a @ layer.b).item()
    assert row[1:4] == ["4", "2", f"{layer.parameters:,}"]
    assert float(row[4]) == pytest.approx(length, rel=1e-3)
    other = next(line for line in lines if line.startswith(V)).split()
    assert len(row[5]) < len(other[5])
    done = run("mlx_lm.lora", "--optiq-info", folder, check=True)
    assert done.stdout.strip() == table(adapter).strip()
