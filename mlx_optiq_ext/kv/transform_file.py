"""The transforms of a plan's keys, in a file beside it.

Its arrays are ``layers.N.centre`` and ``layers.N.basis`` for each decoder layer that has one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from .. import files
from ..errors import InputError
from .formats import KeyTransform

#: File beside kv_config.json.
FILE = "kv_transforms.safetensors"
#: Most heads of a layer, and the largest head dimension.
HEADS, WIDEST = 1024, 2048
#: How much a transform may shrink and stretch keys: beyond it they leave the range of 16 bits.
STRETCH = 1e-4, 1e4

_AGAIN = "write the plan again with mlx_lm.convert --optiq-kv-budget"


def read(path: Path, layers: list[int]) -> dict[int, KeyTransform]:
    """The transforms of some layers.

    Raises:
        InputError: The file lacks a layer, or one of its arrays is damaged.
    """
    header = files.read_header(path)
    for layer in layers:
        centre, basis = (header.tensors.get(name) for name in _names(layer))
        if centre is None or basis is None:
            raise InputError(f"{path} lacks the transform of layer {layer}: {_AGAIN}")
        _check_shapes(centre.shape, basis.shape, f"{path}: layer {layer}")
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    return {
        layer: restored([arrays[name] for name in _names(layer)], f"{path}: layer {layer}")
        for layer in layers
    }


def write(path: Path, transforms: Mapping[int, KeyTransform]) -> None:
    """Write what `read` reads, for each decoder layer."""
    arrays = {}
    for layer, transform in transforms.items():
        for name, array in zip(_names(layer), stored(transform), strict=True):
            arrays[name] = array
    with files.replaced(path) as place:
        mx.save_safetensors(str(place), arrays, {"format": "mlx"})


def stored(transform: KeyTransform) -> list[mx.array]:
    """Centre and basis as arrays."""
    return [mx.array(transform.centre), mx.array(transform.basis)]


def restored(arrays: Sequence[mx.array], where: str) -> KeyTransform:
    """Undo `stored`, for groups of the default size.

    Raises:
        InputError: They are no centre and basis that has an inverse.
    """
    centre, basis = arrays
    _check_shapes(centre.shape, basis.shape, where)
    found = [np.array(array.astype(mx.float32)) for array in arrays]
    if not all(np.isfinite(array).all() for array in found):
        raise InputError(f"{where}: a transform of keys is not finite: {_AGAIN}")
    sizes = np.linalg.svd(found[1].astype(np.float64), compute_uv=False)
    if not (sizes[:, -1] > 1e-9 * sizes[:, 0]).all():
        raise InputError(f"{where}: a transform of keys has no inverse: {_AGAIN}")
    if not ((sizes[:, 0] > STRETCH[0]) & (sizes[:, 0] < STRETCH[1])).all():
        raise InputError(
            f"{where}: a transform stretches keys by {sizes[:, 0].max():.0e}, which no model "
            f"needs: {_AGAIN}"
        )
    return KeyTransform(found[0], found[1])


def _names(layer: int) -> tuple[str, str]:
    return f"layers.{layer}.centre", f"layers.{layer}.basis"


def _check_shapes(centre: tuple[int, ...], basis: tuple[int, ...], where: str) -> None:
    heads, dim = (*centre, 0, 0, 0)[0], (*centre, 0, 0, 0)[2]
    if centre != (heads, 1, dim) or basis != (heads, dim, dim):
        raise InputError(
            f"{where}: a transform of keys has arrays {centre} and {basis}, not (heads, 1, dim) "
            f"and (heads, dim, dim): {_AGAIN}"
        )
    if not (0 < heads <= HEADS and 0 < dim <= WIDEST):
        raise InputError(f"{where}: a transform of {heads} heads of {dim} is of no known model")
