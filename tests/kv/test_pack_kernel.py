"""The kernel that packs new keys and values, its own source run on the CPU."""

from typing import Any

import mlx.core as mx
import pytest
from kernel_shim import kernel_factory

from mlx_optiq_ext.kv import Format, Packed, PackedKVCache
from mlx_optiq_ext.kv.attention import dispatch
from mlx_optiq_ext.kv.attention.kernels import packing

pytestmark = pytest.mark.newest

#: (keys, values, (key dim, value dim), length): every width and group size.
CASES = {
    "4 bits": (Format(4, 64), Format(4, 64), (128, 128), 1),
    "8 and 3": (Format(8, 32), Format(3, 128), (64, 128), 5),
    "5 and 6": (Format(5, 32), Format(6, 32), (96, 96), 2),
    "2 and 5": (Format(2, 64), Format(5, 128), (256, 256), 3),
    "rotated": (Format(3, 64, rotated=True), Format(2, 32), (64, 64), 9),
}


@pytest.fixture(params=["cuda", "metal"])
def platform(request, monkeypatch, tmp_path):
    name = request.param
    packing._call.cache_clear()
    monkeypatch.setattr(mx.fast, f"{name}_kernel", kernel_factory(name, tmp_path))
    yield name
    packing._call.cache_clear()


def arrays(case: str, dtype: mx.Dtype = mx.bfloat16) -> list[mx.array]:
    _, _, dims, length = CASES[case]
    mx.random.seed(3)
    return [(mx.random.normal((2, 3, length, dim)) + 0.3).astype(dtype) for dim in dims]


def error(packed: Packed, array: mx.array) -> float:
    difference = packed.plain(mx.float32) - array.astype(mx.float32)
    return float(mx.square(difference).mean())


@pytest.mark.parametrize("case", CASES)
def test_it_packs_as_well_as_a_prompt_is_packed(case, platform):
    formats: Any = CASES[case][:2]
    given: Any = arrays(case)
    assert packing.packs(given[0], given[1], formats)
    found: Any = packing.pack(platform, given[0], given[1], formats)
    for array, format, parts in zip(given, formats, [found[:3], found[3:]], strict=True):
        packed = Packed(parts, format)
        assert packed.shape == array.shape
        assert packed.dtype == array.dtype
        prompt = mx.repeat(array, 9, axis=2)  # long enough to be fitted
        expected = Packed([p[:, :, ::9] for p in format.pack(prompt)], format)
        assert error(packed, array) < 1.01 * error(expected, array)


def test_a_group_of_equal_elements_comes_back(platform):
    formats: Any = (Format(4, 32), Format(8, 32))
    given: Any = [mx.full((1, 1, 1, 64), value, mx.bfloat16) for value in (0.0, -1.5)]
    found: Any = packing.pack(platform, given[0], given[1], formats)
    for array, format, parts in zip(given, formats, [found[:3], found[3:]], strict=True):
        assert mx.array_equal(Packed(parts, format).plain(), array)


def test_what_it_cannot_pack_is_left_to_mlx():
    keys, values = arrays("4 bits")
    format = Format(4, 64)
    assert packing.packs(keys, values, (format, format))
    assert not packing.packs(keys, values, (format, None))
    assert not packing.packs(keys.astype(mx.float32), values, (format, format))
    assert not packing.packs(keys[:, :1], values, (format, format))
    assert not packing.packs(keys[:, :, :0], values[:, :, :0], (format, format))


def test_a_cache_packs_with_it(platform, monkeypatch):
    from mlx_lm.models.cache import KVCache

    monkeypatch.setattr("mlx_optiq_ext.kv.packing.backend", lambda: platform)
    monkeypatch.setattr("mlx_optiq_ext.kv.packing.has_kernel", lambda name: True)
    monkeypatch.setattr(Format, "pack", None)
    cache = PackedKVCache(KVCache(), Format(4), Format(4), interleaved=False)
    given: Any = arrays("4 bits")
    for _ in range(2):
        keys, values = cache.update_and_fetch(given[0], given[1])
    for packed, array in zip((keys, values), given, strict=True):
        assert packed.shape == (2, 3, 2, 128)
        assert mx.allclose(packed.plain()[:, :, 1:], array, atol=0.3)


def test_a_gpu_has_it_where_it_has_the_decoding_kernel(monkeypatch):
    assert not dispatch.has_kernel("metal")
    monkeypatch.setenv("MLX_OPTIQ_EXT_METAL_KERNEL", "1")
    assert dispatch.has_kernel("metal")
