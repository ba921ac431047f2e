"""Plans of models that mlx-optiq published, and plans of any size."""

import json
import time
from dataclasses import replace

import pytest
from toy_qwen3 import write_toy

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.model.config import place
from mlx_optiq_ext.model.loading import load_unquantized
from mlx_optiq_ext.weights import Precision, Size, Tensor, read_plan, tensors

#: What mlx-optiq writes: PyTorch's names of the linear layers, and nothing of embeddings.
LAYERS = {
    f"layers.{layer}.{block}_proj": {"bits": bits, "group_size": 64}
    for layer, bits in enumerate((4, 8))
    for block in (
        *(f"self_attn.{name}" for name in "qkvo"),
        *(f"mlp.{name}" for name in ("gate", "up", "down")),
    )
}


def write(folder, entries, form="newer"):
    path = folder / "optiq_metadata.json"
    content = {"per_layer": entries}
    path.write_text(json.dumps(content if form == "newer" else {"optimization": content}))
    return path


def read(model, folder, entries, form="newer"):
    found = tuple(tensors(model, allow_unquantized=True))
    return read_plan(write(folder, entries, form), found, Size.of(model, found))


@pytest.fixture
def tied(tmp_path):
    """A random model whose head is its embedding."""
    return load_unquantized(str(write_toy(tmp_path / "tied", tie_word_embeddings=True)))[0]


@pytest.mark.parametrize("form", ["newer", "older"])
@pytest.mark.parametrize("stem", ["model", "model.language_model", "language_model.model"])
def test_published_names_are_read(tied, tmp_path, stem, form):
    plan = read(tied, tmp_path, {f"{stem}.{name}": e for name, e in LAYERS.items()}, form)
    assert plan.precisions["model.layers.0.mlp.up_proj"] == Precision(4, 64)
    assert plan.precisions["model.layers.1.mlp.up_proj"] == Precision(8, 64)


def test_what_a_plan_does_not_name_gets_its_highest_bits(tied, tmp_path):
    plan = read(tied, tmp_path, {f"model.{name}": entry for name, entry in LAYERS.items()})
    assert plan.precisions["model.embed_tokens"] == Precision(8, 64)
    (note,) = plan.notes
    assert "does not name 1 of 15 tensors, such as model.embed_tokens: they get" in note
    assert note.endswith("its highest bits, 8-bit g64")
    four = {f"model.{name}": {"bits": 4, "group_size": 64} for name in LAYERS}
    assert read(tied, tmp_path, four).achieved_bpw == pytest.approx(4.5, abs=0.1)


def test_the_models_own_floor_stands(tied, tmp_path):
    own = tied.model.embed_tokens
    tied.quant_predicate = lambda path, module: module is not own or {"group_size": 32, "bits": 8}
    four = {f"model.{name}": {"bits": 4, "group_size": 128} for name in LAYERS if "down" in name}
    plan = read(tied, tmp_path, four)
    assert plan.precisions["model.embed_tokens"] == Precision(8, 32)
    # Groups of 128 do not divide 64 inputs.
    assert plan.precisions["model.layers.0.mlp.up_proj"] == Precision(4, 64)


def test_the_head_of_a_tied_model_is_its_embedding(tied, tmp_path):
    head = {"lm_head": {"bits": 6, "group_size": 32}}
    plan = read(tied, tmp_path, head | {f"model.{name}": e for name, e in LAYERS.items()})
    assert plan.precisions["model.embed_tokens"] == Precision(6, 32)
    assert plan.notes == ()
    both = head | {"model.embed_tokens": {"bits": 8, "group_size": 64}}
    assert read(tied, tmp_path, both).precisions["model.embed_tokens"] == Precision(8, 64)


def test_the_head_of_another_model_is_itself(tmp_path):
    path = write_toy(tmp_path / "untied", tie_word_embeddings=False)
    plan = read(load_unquantized(str(path))[0], tmp_path, {"lm_head": {"bits": 6}})
    assert plan.precisions["lm_head"] == Precision(6, 64)


def test_names_of_other_modalities_are_left_out(tied, tmp_path):
    entries = {f"model.{name}": e for name, e in LAYERS.items()}
    towers = {"model.visual.blocks.0.attn.qkv": {"bits": 4}, "mtp.fc": {"bits": 4}}
    assert read(tied, tmp_path, entries | towers) == read(tied, tmp_path, entries)
    with pytest.raises(InputError, match=r"names model\.layers\.7\.mlp\.up_proj, which this model"):
        read(tied, tmp_path, {"model.layers.7.mlp.up_proj": {"bits": 4}})


def test_a_plan_of_a_hundred_thousand_names_is_read_in_seconds(tmp_path):
    one = Tensor("", (64, 64), 16, (Precision(4, 64),))
    found = tuple(replace(one, path=f"model.layers.{i}.up_proj") for i in range(100_000))
    path = write(tmp_path, {f"language_model.{t.path}.weight": {"bits": 4} for t in found})
    started = time.process_time()
    plan = read_plan(path, found, Size(64 * 64 * len(found), 0))
    assert time.process_time() - started < 6  # matching each with each takes hours
    assert plan.achieved_bpw == pytest.approx(4.5)


def test_a_name_that_may_mean_several_layers_means_none():
    known = {"model.norm", "backbone.norm"}
    assert place("language_model.norm", known) is None
    assert place("backbone.norm.weight", known) == "backbone.norm"
