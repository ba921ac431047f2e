"""How much memory and time adapters may take: shared copies, caps, and files made to be slow."""

import json
import struct
import time

import mlx.core as mx
import pytest

from mlx_optiq_ext.adapters import (
    Caps,
    Catalogue,
    Offer,
    mount_adapter_on_model,
    mounts_on,
    unmount,
)
from mlx_optiq_ext.adapters.catalogue import State
from mlx_optiq_ext.errors import InputError

from .catalogue.generating import generating, mounted, using, version


def mounts_of(model):
    mounts = mounts_on(model)
    assert mounts is not None
    return mounts


def test_names_for_one_folder_share_its_weights(model, adapter):
    folder = adapter("A", rank=8)
    catalogue = Catalogue(limit=1, patience=5)
    with generating(catalogue, model):
        first = catalogue.load(Offer("0", "A", folder))
        mx.clear_cache()
        before = mx.get_active_memory()
        for number in range(1, 40):
            assert catalogue.load(Offer(str(number), "A", folder)) is first
        assert mx.get_active_memory() - before < first.nbytes
        assert len(mounted(catalogue)) == 40
        # Each name goes by itself, and the weights with the last one.
        with using(catalogue, "7") as adapter_in_use:
            for number in range(39):
                catalogue.unload(str(number))
            assert adapter_in_use is first
        assert version(catalogue, "39") == first.version
        assert mounts_of(model).resolve(first) is first
        catalogue.unload("39")
        assert mounts_of(model).paths == frozenset()


def test_names_for_one_folder_take_one_place_and_are_evicted_together(model, adapter):
    shared, other = adapter("A"), adapter("B", seed=3)
    offers = [Offer("a", "A", shared), Offer("b", "B", other), Offer("c", "A", shared)]
    catalogue = Catalogue(offers, limit=1, patience=5)
    with generating(catalogue, model):
        assert version(catalogue, "a") == version(catalogue, "c")
        assert mounted(catalogue) == {"a", "c"}
        assert version(catalogue, "b")
        assert catalogue.states() == {"a": State.ABSENT, "b": State.MOUNTED, "c": State.ABSENT}
        # Other weights for one of the names leave those of the other.
        assert version(catalogue, "a") == version(catalogue, "c")
        new = catalogue.load(Offer("a", "B", other), replace=True)
        assert version(catalogue, "a") == version(catalogue, "b") == new.version
        assert version(catalogue, "c") != new.version


def test_names_share_weights_in_python_too(model, adapter):
    first = mount_adapter_on_model(model, "A", adapter("A"))
    assert mount_adapter_on_model(model, "B", adapter("A2")) is first
    unmount(model, "A")
    assert mounts_of(model).names == {"B": first}
    assert mounts_of(model).paths
    unmount(model, "B")
    assert not mounts_of(model).paths


@pytest.mark.parametrize(
    ("caps", "message"),
    [
        (Caps(rank=7), "has rank 8 at .*, and at most 7 is served: raise --optiq-max-adapter-rank"),
        (Caps(nbytes=10_000), "at most 10,000 are served: raise --optiq-max-adapter-bytes"),
    ],
    ids=["rank", "bytes"],
)
def test_an_adapter_beyond_the_caps_is_refused(model, adapter, caps, message):
    small = adapter("small", rank=1, keys=["self_attn.v_proj"])
    catalogue = Catalogue([Offer("small", "small", small)], caps=caps, patience=5)
    with generating(catalogue, model):
        good = version(catalogue, "small")
        for name, replace in (("small", True), ("large", False)):
            with pytest.raises(InputError, match=message):
                catalogue.load(Offer(name, "large", adapter("large", rank=8)), replace=replace)
        assert [each.name for each in catalogue.offers()] == ["small"]
        assert version(catalogue, "small") == good


def many_tensors(folder, count):
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"model.layers.{n}.q_proj.lora_a": empty for n in range(count)}).encode()
    path = folder / "adapters.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def tiny_tensors(folder, count):
    header = {
        f"model.layers.{n}.q_proj.lora_a": {
            **{"dtype": "F32", "shape": [1, 1]},
            "data_offsets": [4 * n, 4 * n + 4],
        }
        for n in range(count)
    }
    content = json.dumps(header).encode()
    path = folder / "adapters.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content + bytes(4 * count))


def test_a_file_of_more_tensors_than_the_model_has_places_for_is_not_read(model, adapter):
    folder, catalogue = adapter("A"), Catalogue(patience=30)
    tiny_tensors(folder, 2_000)
    message = "has 2,000 tensors, and an adapter of this model"
    with generating(catalogue, model), pytest.raises(InputError, match=message):
        catalogue.load(Offer("many", "A", folder))


def many_patterns(folder, count):
    (folder / "adapters.safetensors").rename(folder / "adapter_model.safetensors")
    ranks = {f"layers\\.{n}\\.(q|k)_proj": 4 for n in range(count)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": ranks}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "count"),
    [(many_tensors, 300_000), (tiny_tensors, 60_000), (many_patterns, 200_000)],
    ids=["empty", "tiny", "patterns"],
)
def test_a_file_that_would_take_long_is_refused_soon(model, adapter, damage, count):
    folder = adapter("A")
    damage(folder, count)
    catalogue = Catalogue(patience=30)
    with generating(catalogue, model):
        began = time.monotonic()
        with pytest.raises(InputError):
            catalogue.load(Offer("slow", "A", folder))
        assert time.monotonic() - began < 5
