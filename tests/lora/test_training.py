"""``mlx_lm.lora --train`` with our options, in this process."""

import importlib
import json
import shutil
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_optiq_ext.lora import read_adapter

from .conftest import BY_BITS, PATH, load_tensors, logits

Q, V = PATH.format(0, "q"), PATH.format(0, "v")


def notes_of(folder):
    return json.loads((folder / "optiq_lora_config.json").read_text())


def test_ranks_follow_bits_at_the_same_parameters(lora, packed, tmp_path, capsys):
    lora(packed, tmp_path / "a", *BY_BITS)
    assert "[optiq] by_bits: ranks" in capsys.readouterr().out
    notes = notes_of(tmp_path / "a")
    assert abs(notes["parameters"] / notes["budget"] - 1) < 0.01
    assert notes["ranks"][V] > notes["ranks"][Q] > notes["ranks"][PATH.format(0, "o")]
    adapter = read_adapter(tmp_path / "a")
    assert {path: layer.rank for path, layer in adapter.layers.items()} == notes["ranks"]
    assert sum(layer.parameters for layer in adapter.layers.values()) == notes["parameters"]
    # What is stored is LoRA only, at one rank, under mlx-lm's own keys.
    tensors = load_tensors(tmp_path / "a" / "adapters.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"lora_a", "lora_b"}
    widest = max(notes["ranks"].values())
    assert {t.shape[1] for name, t in tensors.items() if name.endswith("lora_a")} == {widest}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {"rank": widest, "dropout": 0.0, "scale": 20.0}
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", -1)
    assert not [key for key in config if "optiq" in key]


def test_the_stock_form_computes_what_ours_does(lora, packed, tmp_path, tokens, run):
    lora(packed, tmp_path / "a", *BY_BITS, "--learning-rate", 1e-3)
    ours = logits(mlx_lm.load(str(packed), adapter_path=str(tmp_path / "a"))[0], tokens)
    code = (
        "import mlx.core as mx, mlx_lm, sys\n"
        "model = mlx_lm.load(sys.argv[1], adapter_path=sys.argv[2])[0]\n"
        f"mx.save(sys.argv[3], model(mx.array({tokens.tolist()})))\n"
    )
    out = tmp_path / "stock.npy"
    stock = {"MLX_OPTIQ_EXT": "0"}
    run("python", "-c", code, packed, tmp_path / "a", out, env=stock, check=True)
    theirs = mx.load(str(out))
    # Sums over padded ranks may come in another order.
    assert mx.abs(ours - theirs).max() < 1e-5 * mx.abs(ours).max()
    assert mx.abs(ours - logits(mlx_lm.load(str(packed))[0], tokens)).max() > 1e-3


@pytest.mark.parametrize("key", ["optiq_rank_scaling", "optiq-rank-scaling"])
def test_by_kl_reads_what_was_measured(lora, packed, tmp_path, capsys, key):
    keys = ("-c", tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text(
        f"{key}: by_kl\n"
        "lora_parameters: {rank: 6, scale: 4.0, dropout: 0.0, "
        "keys: [self_attn.q_proj, self_attn.v_proj]}\n"
    )
    lora(packed, tmp_path / "a", *keys)
    notes = notes_of(tmp_path / "a")
    assert notes["scaling"] == "by_kl"
    assert "; KL measured on text sampled from the model itself" in capsys.readouterr().out
    ranks = [notes["ranks"][PATH.format(n, "q")] for n in range(6)]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1] < notes["ranks"][V]
    assert abs(notes["parameters"] / notes["budget"] - 1) < 0.01
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert not [key for key in config if "optiq" in key]


@pytest.mark.parametrize(
    ("scaling", "why"),
    [
        (["by_kl"], "by_kl has nothing to go by: this model has no measured KL"),
        (["by_bits"], "by_bits has nothing to go by: the layers' bits are all the same"),
        ([], "by_kl has nothing to go by"),
    ],
)
def test_a_model_that_says_nothing_gets_a_constant_rank(lora, tiny, tmp_path, capsys, scaling, why):
    lora(tiny, tmp_path / "a", "--optiq-rank-scaling", *scaling, iters=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "[optiq]" in line]
    assert len(lines) == 1
    assert why in lines[0]
    assert set(notes_of(tmp_path / "a")["ranks"].values()) == {8}


def test_trainings_in_one_process_leave_nothing_behind(lora, packed, tmp_path, monkeypatch):
    module = importlib.import_module("mlx_lm.lora")
    trainer = importlib.import_module("mlx_lm.tuner.trainer")
    defaults = json.dumps(module.CONFIG_DEFAULTS)
    model: Any = mlx_lm.load(str(packed))[0]
    layer = type(model.layers[0])
    forward = layer.__call__
    compiled = []

    def compiling(function: Any = None, *args, **kwargs) -> Any:
        if "outputs" in kwargs:
            compiled.append(kwargs)
        return function

    monkeypatch.setattr(mx, "compile", compiling)
    for name in "ab":
        lora(packed, tmp_path / name, *BY_BITS, "--grad-checkpoint")
        assert layer.__call__ is forward
    assert compiled == []
    one, two = (load_tensors(tmp_path / name / "adapters.safetensors") for name in "ab")
    assert all(mx.allclose(one[name], two[name], atol=1e-6) for name in one)
    lora(packed, tmp_path / "c", *BY_BITS, compiled=True)
    assert len(compiled) == 1
    assert json.dumps(module.CONFIG_DEFAULTS) == defaults
    assert trainer.mx is mx


def test_an_unused_package_trains_as_stock(lora, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(mx, "compile", lambda function, *args, **kwargs: function)
    lora(tiny, tmp_path / "a", compiled=True, iters=1)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "adapter_config.json",
        "adapters.safetensors",
    }
    assert "peft_type" not in (tmp_path / "a" / "adapter_config.json").read_text()


def test_dora_of_three_bits(lora, packed, tmp_path, tokens):
    lora(packed, tmp_path / "a", *BY_BITS, "--fine-tune-type", "dora", "--learning-rate", 1e-3)
    adapter = read_adapter(tmp_path / "a")
    assert adapter.dora
    loaded = mlx_lm.load(str(packed), adapter_path=str(tmp_path / "a"))[0]
    assert mx.abs(logits(loaded, tokens) - logits(mlx_lm.load(str(packed))[0], tokens)).max() > 1e-4


def test_adapters_start_from_what_quantization_took(lora, packed, tiny, tmp_path):
    original = mlx_lm.load(str(tiny))[0]
    original.set_dtype(mx.float32)
    flags = (*BY_BITS, "--optiq-init", "residual", "--optiq-original", tiny, "--learning-rate", 0)
    lora(packed, tmp_path / "a", *flags, iters=1)
    assert notes_of(tmp_path / "a")["init"] == "residual"
    plain, tokenizer = mlx_lm.load(str(packed))[:2]
    repaired = mlx_lm.load(str(packed), adapter_path=str(tmp_path / "a"))[0]
    text = mx.array([tokenizer.encode("Tom has 67 coins and Emma has 25 coins. How many?")])
    assert divergence(original, repaired, text) < 0.5 * divergence(original, plain, text)


def test_it_works_from_python_without_a_command(packed, data, tmp_path):
    from types import SimpleNamespace

    module = importlib.import_module("mlx_lm.lora")
    wanted = {
        "model": str(packed),
        "data": str(data),
        "train": True,
        "iters": 1,
        "batch_size": 1,
        "max_seq_length": 32,
        "val_batches": 1,
        "num_layers": -1,
        "adapter_path": str(tmp_path / "a"),
        "optiq_rank_scaling": "by_bits",
        "optiq_no_compile": True,
    }
    module.run(SimpleNamespace(**{**module.CONFIG_DEFAULTS, **wanted}))
    assert notes_of(tmp_path / "a")["scaling"] == "by_bits"


def divergence(reference, model, tokens) -> float:
    one, other = (mx.log(mx.softmax(each(tokens), axis=-1)) for each in (reference, model))
    return float(np.array((mx.exp(one) * (one - other)).sum(-1).mean()))


def test_the_base_is_not_trained(lora, packed, tmp_path):
    shutil.copytree(packed, tmp_path / "model")
    before = dict(tree_flatten(mlx_lm.load(str(packed))[0].parameters()))
    lora(tmp_path / "model", tmp_path / "a", *BY_BITS, "--learning-rate", 1e-3)
    tensors = load_tensors(tmp_path / "a" / "adapters.safetensors")
    assert not set(tensors) & set(before)
