"""Adapters of every form are read without a model, and bad ones refused."""

import dataclasses
import json
import math
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_optiq_ext import OptiqError
from mlx_optiq_ext.lora import fit, read_adapter

from .conftest import PATH, load_tensors

Q0, V1 = PATH.format(0, "q"), PATH.format(1, "v")


def merged_logits(model, adapter, tokens):
    """Logits with the update added to the weights, as the formula says."""
    modules = dict(model.named_modules())
    for path, layer in fit(adapter, model).layers.items():
        a, b = layer.a.astype(mx.float32), layer.b.astype(mx.float32)
        weight = modules[path].weight + layer.scale * (a @ b).T
        if layer.magnitude is not None:
            length = mx.linalg.norm(weight, axis=1, keepdims=True)
            weight = layer.magnitude.astype(mx.float32)[:, None] * weight / length
        modules[path].weight = weight
    return np.array(model(tokens))


@pytest.mark.parametrize("name", ["mixed", "rslora", "dora"])
def test_an_adapter_made_by_peft_means_the_same_here(exact, recorded, tokens, name):
    adapter = read_adapter(recorded / name)
    assert adapter.form == "peft"
    assert adapter.dora == (name == "dora")
    plain = np.array(exact(tokens))
    expected = np.load(recorded / name / "logits.npy")
    assert np.abs(plain - expected).max() > 0.1
    assert np.abs(merged_logits(exact, adapter, tokens) - expected).max() < 1e-3


def test_peft_ranks_and_scales_follow_their_patterns(recorded):
    layers = read_adapter(recorded / "mixed").layers
    found = {path: (layer.rank, layer.scale) for path, layer in layers.items()}
    assert len(found) == 9
    assert found[PATH.format(0, "q")] == (4, 12 / 4)
    assert found[PATH.format(1, "q")] == (7, 12 / 7)
    assert found[PATH.format(1, "v")] == (4, 3 / 4)
    assert found[PATH.format(2, "v")] == (4, 12 / 4)
    assert found["model.layers.2.mlp.down_proj"] == (2, 5 / 2)
    assert read_adapter(recorded / "rslora").layers[PATH.format(0, "k")].scale == 6 / 3**0.5
    assert layers[V1].a.dtype == mx.bfloat16


def test_ranks_of_their_own_and_padded_ones_read_the_same(stored):
    mixed = read_adapter(stored({Q0: 2, V1: 5}))
    assert {path: layer.rank for path, layer in mixed.layers.items()} == {Q0: 2, V1: 5}
    assert not any(layer.stacked for layer in mixed.layers.values())
    folder = stored({Q0: 2, V1: 5}, notes={"ranks": {Q0: 2, V1: 5}}, name="padded")
    tensors = {}
    for path, layer in mixed.layers.items():
        wide = layer.padded(5, 4.0)
        tensors |= {f"{path}.lora_a": wide.a, f"{path}.lora_b": wide.b}
    assert tensors[f"{Q0}.lora_a"].shape == (128, 5)
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    again = read_adapter(folder)
    for path, layer in mixed.layers.items():
        other = again.layers[path]
        assert (other.rank, other.scale) == (layer.rank, layer.scale)
        assert mx.array_equal(other.a, layer.a)
        assert mx.array_equal(other.b, layer.b)


def test_padding_with_another_scale_keeps_the_update(stored):
    layer = read_adapter(stored({Q0: 3})).layers[Q0]
    wide = layer.padded(6, 10.0)
    assert (wide.rank, wide.scale) == (6, 10.0)
    assert mx.allclose(wide.scale * wide.a @ wide.b, layer.scale * layer.a @ layer.b, atol=1e-6)


def test_it_can_be_used_on_another_thread(recorded):
    import threading

    layer = read_adapter(recorded / "mixed").layers[Q0]
    seen = []
    work = threading.Thread(target=lambda: seen.append(mx.abs(layer.a @ layer.b).sum().item()))
    work.start()
    work.join()
    assert seen[0] > 0


def test_a_wrapped_model_takes_the_unwrapped_paths(exact, recorded):
    adapter = read_adapter(recorded / "rslora")
    stems = ("language_model.model.", "model.language_model.", "model.language_model.model.")
    for stem in stems:
        layers = {stem + p.removeprefix("model."): each for p, each in adapter.layers.items()}
        found = fit(dataclasses.replace(adapter, layers=layers), exact)
        assert set(found.layers) == set(adapter.layers)


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without(folder, *names):
    for name in names:
        (folder / name).unlink()


def cut(folder):
    path = folder / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def poison(folder, value):
    path = str(folder / "adapters.safetensors")
    tensors = load_tensors(path)
    tensors[f"{Q0}.lora_b"] = tensors[f"{Q0}.lora_b"] * value
    mx.save_safetensors(path, tensors)


def retyped(folder, dtype):
    path = str(folder / "adapters.safetensors")
    tensors = load_tensors(path)
    tensors[f"{Q0}.lora_b"] = tensors[f"{Q0}.lora_b"].astype(dtype)
    mx.save_safetensors(path, tensors)


def extra(folder):
    path = str(folder / "adapters.safetensors")
    mx.save_safetensors(path, {**load_tensors(path), "model.norm.weight": mx.ones(128)})


DAMAGE = {
    "no weights": (lambda f: without(f, "adapters.safetensors"), "adapters.safetensors"),
    "no config": (lambda f: without(f, "adapter_config.json"), "adapter_config.json"),
    "cut short": (cut, "damaged or incomplete"),
    "not safetensors": (
        lambda f: (f / "adapters.safetensors").write_text("hello"),
        "damaged or incomplete",
    ),
    "no scale": (lambda f: edit(f, lora_parameters={"rank": 2}), "no scale"),
    "scale of text": (lambda f: edit(f, lora_parameters={"scale": "2"}), "scale is '2'"),
    "scale of NaN": (lambda f: edit(f, lora_parameters={"scale": math.nan}), "adapter_config.json"),
    "scale of infinity": (
        lambda f: edit(f, lora_parameters={"scale": math.inf}),
        "adapter_config.json",
    ),
    "huge scale": (lambda f: edit(f, lora_parameters={"scale": 1e30}), r"scale is 1e\+30"),
    "whole numbers": (lambda f: retyped(f, mx.int32), "lora_b is of type I32"),
    "complex numbers": (lambda f: retyped(f, mx.complex64), "lora_b is of type C64"),
    "DoRA without lengths": (lambda f: edit(f, fine_tune_type="dora"), f"{Q0} has no m in"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not JSON"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "not a JSON object"),
    "NaN": (lambda f: poison(f, mx.nan), "NaN or infinity"),
    "infinity": (lambda f: poison(f, mx.inf), "NaN or infinity"),
    "full fine-tune": (lambda f: edit(f, fine_tune_type="full"), "full fine-tune"),
    "trained norms": (extra, "model.norm.weight"),
    "ranks of text": (
        lambda f: (f / "optiq_lora_config.json").write_text('{"ranks": "8"}'),
        "ranks in optiq_lora_config.json",
    ),
    "ranks of another": (
        lambda f: (f / "optiq_lora_config.json").write_text(json.dumps({"ranks": {Q0: 1}})),
        "different trainings",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_adapter_is_refused_with_one_sentence(stored, name):
    folder = stored({Q0: 2, V1: 2})
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(OptiqError, match=message) as caught:
        read_adapter(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


PEFT_DAMAGE = {
    "another method": ({"peft_type": "IA3"}, "peft_type"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha"),
    "huge alpha": ({"alpha_pattern": {"q_proj": 1e12}}, "lora_alpha 1000000000000.0"),
    "DoRA without lengths": ({"use_dora": True}, "has no lora_magnitude_vector in"),
    "another rank": ({"r": 5}, "different adapters"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model"),
    "bad pattern": ({"rank_pattern": {"(": 3}}, "regular expression"),
    "pattern of text": ({"alpha_pattern": {"q_proj": "3"}}, "alpha_pattern"),
    "experts": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
}


@pytest.mark.parametrize("name", PEFT_DAMAGE)
def test_what_mlx_lm_has_no_layer_for_is_refused(recorded, tmp_path, name):
    folder = shutil.copytree(recorded / "mixed", tmp_path / "copy")
    changes, message = PEFT_DAMAGE[name]
    edit(folder, **changes)
    with pytest.raises(OptiqError, match=message):
        read_adapter(folder)


def test_tensors_that_are_no_lora_are_refused(recorded, tmp_path):
    folder = shutil.copytree(recorded / "mixed", tmp_path / "copy")
    path = str(folder / "adapter_model.safetensors")
    more = {"base_model.model.lm_head.weight": mx.ones((4, 4))}
    mx.save_safetensors(path, {**load_tensors(path), **more})
    with pytest.raises(OptiqError, match=r"lm_head\.weight is no LoRA tensor"):
        read_adapter(folder)


@pytest.mark.parametrize("source", ["no/such/folder", "nobody/nothing", "word"])
def test_what_is_neither_a_folder_nor_a_repository(source):
    with pytest.raises(OptiqError, match=r"no such folder|no folder here"):
        read_adapter(source)


def test_a_pickled_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(OptiqError, match="safe_serialization"):
        read_adapter(tmp_path)


def test_an_adapter_of_another_model_does_not_fit(exact, stored):
    adapter = read_adapter(stored({PATH.format(9, "q"): 2}))
    with pytest.raises(OptiqError, match=r"model\.layers\.9\.self_attn\.q_proj"):
        fit(adapter, exact)
    layer = read_adapter(stored({Q0: 2})).layers[Q0]
    wrong = dataclasses.replace(adapter, layers={V1: layer})
    with pytest.raises(OptiqError, match=r"does not fit model\.layers\.1\.self_attn\.v_proj"):
        fit(wrong, exact)
    norm = dataclasses.replace(adapter, layers={"model.norm": layer})
    with pytest.raises(OptiqError, match="RMSNorm"):
        fit(norm, exact)
    huge = dataclasses.replace(adapter, layers={Q0: layer.padded(300, 4.0)})
    with pytest.raises(OptiqError, match="rank 300"):
        fit(huge, exact)


def test_a_tied_head_would_see_an_embedding_adapter(exact, recorded):
    adapter = read_adapter(recorded / "rslora")
    a, b = mx.zeros((1024, 2)), mx.zeros((2, 128))
    layer = dataclasses.replace(next(iter(adapter.layers.values())), a=a, b=b)
    tied = dataclasses.replace(adapter, layers={"model.embed_tokens": layer})
    with pytest.raises(OptiqError, match="head"):
        fit(tied, exact)


def test_reading_changes_no_model(exact, recorded):
    before = tree_flatten(exact.parameters())
    fit(read_adapter(recorded / "mixed"), exact)
    assert [name for name, _ in before] == [n for n, _ in tree_flatten(exact.parameters())]
