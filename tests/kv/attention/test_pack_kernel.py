"""The kernel that packs new keys and values, its own source run on the CPU."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kernel_shim import kernel_factory

from mlx_optiq_ext.kernels import Platform, platform
from mlx_optiq_ext.kv import LayerFormat, Packed, PackedKVCache
from mlx_optiq_ext.kv.attention.kernels import pack_kernel
from mlx_optiq_ext.kv.formats import Affine, KeyTransform, TurboQuant
from mlx_optiq_ext.kv.packed_array import Stack

pytestmark = pytest.mark.newest


def transformed(heads: int, dim: int) -> Affine:
    rng = np.random.default_rng(1)
    basis = rng.standard_normal((heads, dim, dim)) / dim + np.eye(dim)
    centre = rng.standard_normal((heads, 1, dim)).astype(np.float32)
    move = KeyTransform(centre, basis.astype(np.float32))
    return Affine(8, 32, transformed=True).with_transform(move)


#: (keys, values, (key dim, value dim), length): every width and group size.
CASES = {
    "4 bits": (Affine(4, 64), Affine(4, 64), (128, 128), 1),
    "8 and 3": (Affine(8, 32), Affine(3, 128), (64, 128), 5),
    "5 and 6": (Affine(5, 32), Affine(6, 32), (96, 96), 2),
    "2 and 5": (Affine(2, 64), Affine(5, 128), (256, 256), 3),
    "rotated": (Affine(3, 64, rotated=True), Affine(2, 32), (64, 64), 9),
    "rotated in the kernel": (Affine(8, 32), Affine(4, 32, rotated=True), (64, 128), 2),
    "transformed in the kernel": (transformed(3, 64), Affine(3, 64, rotated=True), (64, 64), 2),
}


@pytest.fixture(params=["cuda", "metal"])
def gpu(request, tmp_path) -> Platform:
    return Platform(request.param, kernel_factory(request.param, tmp_path))


def arrays(case: str, dtype: mx.Dtype = mx.bfloat16) -> list[mx.array]:
    _, _, dims, length = CASES[case]
    mx.random.seed(3)
    return [(mx.random.normal((2, 3, length, dim)) + 0.3).astype(dtype) for dim in dims]


def error(packed: Packed, array: mx.array) -> float:
    difference = packed.plain(mx.float32) - array.astype(mx.float32)
    return float(mx.square(difference).mean())


@pytest.mark.parametrize("case", CASES)
def test_it_packs_as_well_as_a_prompt_is_packed(case, gpu):
    sides, given = CASES[case][:2], arrays(case)
    formats = LayerFormat(*sides)
    assert pack_kernel.packs(given[0], given[1], formats)
    found: Any = pack_kernel.pack(gpu, given[0], given[1], formats)
    for array, format, parts in zip(given, sides, [found[:3], found[3:]], strict=True):
        packed = Packed(parts, format)
        assert packed.shape == array.shape
        assert packed.dtype == array.dtype
        prompt = mx.repeat(array, 9, axis=2)  # long enough to be fitted
        expected = Packed([p[:, :, ::9] for p in format.pack(prompt)], format)
        assert error(packed, array) < 1.01 * error(expected, array)


@pytest.mark.parametrize("case", ["4 bits", "transformed in the kernel"])
def test_a_stack_holds_the_very_same(case, gpu):
    keys, values = CASES[case][:2]
    values = replace(values, bits=keys.bits, group_size=keys.group_size)
    formats, given = LayerFormat(keys, values), arrays(case)
    apart: Any = pack_kernel.pack(gpu, given[0], given[1], formats)
    codes, words = pack_kernel.pack(gpu, given[0], given[1], formats, stacked=True)
    stack = Stack(codes, words, mx.bfloat16)
    for found, expected in zip((*stack.parts(0), *stack.parts(1)), apart, strict=True):
        assert mx.array_equal(found, expected)


def test_a_group_of_equal_elements_comes_back(gpu):
    sides = (Affine(4, 32), Affine(8, 32))
    given: Any = [mx.full((1, 1, 1, 64), value, mx.bfloat16) for value in (0.0, -1.5)]
    found: Any = pack_kernel.pack(gpu, given[0], given[1], LayerFormat(*sides))
    for array, format, parts in zip(given, sides, [found[:3], found[3:]], strict=True):
        assert mx.array_equal(Packed(parts, format).plain(), array)


def test_what_it_cannot_pack_is_left_to_the_formats():
    keys, values = arrays("4 bits")
    both = LayerFormat(Affine(4, 64), Affine(4, 64))
    assert pack_kernel.packs(keys, values, both)
    assert not pack_kernel.packs(keys, values, LayerFormat(Affine(4, 64), None))
    assert not pack_kernel.packs(keys, values, LayerFormat(Affine(4, 64), TurboQuant(4, 0, 128)))
    assert not pack_kernel.packs(keys.astype(mx.float32), values, both)
    assert not pack_kernel.packs(keys[:, :1], values, both)
    assert not pack_kernel.packs(keys[:, :, :0], values[:, :, :0], both)


def test_a_cache_packs_with_it(gpu):
    from mlx_lm.models.cache import KVCache

    launched = []

    def counted(**options):
        launched.append(options["name"])
        return gpu.compile(**options)

    formats = LayerFormat(Affine(4), Affine(4))
    cache = PackedKVCache(KVCache(), formats, platform=Platform(gpu.name, counted))
    given: Any = arrays("4 bits")
    for _ in range(2):
        keys, values = cache.update_and_fetch(given[0], given[1])
    assert len(launched) == 1  # one kernel, compiled once
    for packed, array in zip((keys, values), given, strict=True):
        assert packed.shape == (2, 3, 2, 128)
        assert mx.allclose(packed.plain()[:, :, 1:], array, atol=0.3)


def test_metal_has_it_on_request(monkeypatch):
    assert platform.detected("metal").compile is None
    monkeypatch.setenv("MLX_OPTIQ_EXT_METAL_KERNEL", "1")
    assert platform.detected("metal").compile is mx.fast.metal_kernel
