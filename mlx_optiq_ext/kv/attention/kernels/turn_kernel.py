"""Undoes on queries what was done to keys, with one kernel launch where MLX takes several."""

from collections.abc import Callable
from functools import cache

import mlx.core as mx

from ....kernels import PLACES, TYPES, Platform, header, name_of
from ...formats import Affine, Format
from .decode_kernel import DIMS, DTYPES, QUERIES
from .source import source

INPUTS, OUTPUTS = ("queries", "matrix"), ("out",)


def turned(platform: Platform, queries: mx.array, format: Format) -> mx.array:
    """Queries (batch, query heads, length, dim) for keys in a format; see `Format.turn_queries`."""
    transform = format.transform if isinstance(format, Affine) else None
    batch, query_heads, length, dim = queries.shape
    if (
        platform.compile is None
        or transform is None
        or not 0 < length <= QUERIES
        or dim not in DIMS
        or queries.dtype not in DTYPES
        or not batch
    ):
        return format.turn_queries(queries)
    matrix = transform.matrices[2]
    call = _call(platform, dim, query_heads // matrix.shape[0], queries.dtype)
    return call(
        inputs=[queries, matrix],
        grid=(batch * query_heads * length * dim, 1, 1),
        threadgroup=(dim, 1, 1),
        output_shapes=[queries.shape],
        output_dtypes=[queries.dtype],
    )[0]


@cache
def _call(
    platform: Platform, dim: int, repeats: int, dtype: mx.Dtype
) -> Callable[..., list[mx.array]]:
    name = str(dtype).removeprefix("mlx.core.")
    lines = ["namespace family {}", f"typedef {TYPES[platform.name][name]} T;"]
    numbers = {"DIM": dim, "REPEATS": repeats}
    lines += [f"constexpr CONSTANT int {key} = {n};" for key, n in numbers.items()]
    above = "\n".join([header(platform.name), *lines, source("turn.h")])
    body = PLACES[platform.name] + source("turn.body")
    assert platform.compile is not None
    return platform.compile(
        name=name_of(platform.name, above, body),
        input_names=list(INPUTS),
        output_names=list(OUTPUTS),
        header=above,
        source=body,
        ensure_row_contiguous=False,
    )
