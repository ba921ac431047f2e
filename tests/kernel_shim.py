"""Runs the kernels' own source on the CPU, compiled as C++ with a shim of the device's builtins."""

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from shim import nvrtc

SHIM = Path(__file__).parent / "shim"
TYPES = {
    mx.float32: "float",
    mx.float16: "_Float16",
    mx.bfloat16: "lockstep::bfloat16",
    mx.uint32: "uint32_t",
    mx.int32: "int32_t",
    mx.uint8: "uint8_t",
    mx.bool_: "bool",
}
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
PARTS = (("shape", "int"), ("strides", "long"))
#: What Metal tells a kernel of its place; MLX passes those that the source names.
PLACES = (
    "thread_position_in_threadgroup",
    "thread_position_in_grid",
    "threadgroup_position_in_grid",
    "threadgroups_per_grid",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
)


def kernel_factory(platform: str, folder: Path, *, gaps: bool = False) -> Callable[..., Callable]:
    """Stands in for ``mx.fast.cuda_kernel`` or ``mx.fast.metal_kernel``.

    With ``gaps``, arrays of four axes have room between their tokens too.
    """

    def make(
        *,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str,
        ensure_row_contiguous: bool,
    ) -> Callable[..., list[mx.array]]:
        libraries: dict[str, ctypes.CDLL] = {}

        def call(
            *,
            inputs: Sequence[mx.array],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            output_shapes: Sequence[tuple[int, ...]],
            output_dtypes: Sequence[mx.Dtype],
        ) -> list[mx.array]:
            arguments = []
            for i, (arg, array) in enumerate(zip(input_names, inputs, strict=True)):
                arguments.append(_input(i, arg, array.dtype, source))
            for i, (arg, dtype) in enumerate(zip(output_names, output_dtypes, strict=True)):
                arguments.append(f"auto {arg} = ({TYPES[dtype]}*)results[{i}];")
            if platform == "metal":
                arguments += [f"auto {n} = get_{n}();" for n in PLACES if n in source]
            text = _program(platform, header, "\n".join(arguments), source)
            if text not in libraries:
                if platform == "cuda" and nvrtc.wanted():
                    named = zip(input_names, (array.dtype for array in inputs), strict=True)
                    made = zip(output_names, output_dtypes, strict=True)
                    nvrtc.check(header, source, list(named), list(made))
                libraries[text] = _compiled(text, folder / f"{name}_{len(libraries)}")
            spread = gaps and not ensure_row_contiguous
            given = [_spread(array, spread, ensure_row_contiguous) for array in inputs]
            return _launched(
                libraries[text], given, grid, threadgroup, output_shapes, output_dtypes
            )

        return call

    return make


def node_factory() -> Callable[..., Callable]:
    """Stands in for ``mx.fast.cuda_kernel``: a launch is one node of the graph, which gives zeros.

    `mx.export_to_dot` names such nodes ``Depends``.
    """
    zeros: dict[tuple, mx.array] = {}

    def make(**_: Any) -> Callable[..., list[mx.array]]:
        def call(
            *,
            inputs: Sequence[mx.array],
            output_shapes: Sequence[tuple[int, ...]],
            output_dtypes: Sequence[mx.Dtype],
            **_: Any,
        ) -> list[mx.array]:
            found = []
            for key in zip(output_shapes, output_dtypes, strict=True):
                if key not in zeros:
                    zeros[key] = mx.zeros(*key)
                    mx.eval(zeros[key])
                found.append(zeros[key])
            return mx.depends(found, list(inputs))

        return call

    return make


def _input(number: int, name: str, dtype: mx.Dtype, source: str) -> str:
    """An argument and, as in MLX, its shape and strides where the source asks for them."""
    lines = [f"auto {name} = (const {TYPES[dtype]}*)given[{number}];"]
    lines += [
        f"auto {name}_{part} = {part}[{number}];" for part, _ in PARTS if f"{name}_{part}" in source
    ]
    return "\n".join(lines)


def _program(platform: str, header: str, arguments: str, body: str) -> str:
    # The platform's own names come first in a header; the shim gives them instead.
    header = header[header.index("namespace family") :]
    lists = "void** given, int** shape, long** strides, void** results"
    return f"""#include "{SHIM}/{platform}.h"
{header}
static void kernel({lists}) {{
{arguments}
{body}
}}
extern "C" void run({lists}, int* grid, int* group) {{
  lockstep::run(grid, group, [=] {{ kernel(given, shape, strides, results); }});
}}
"""


def _compiled(text: str, path: Path) -> ctypes.CDLL:
    path.with_suffix(".cpp").write_text(text)
    command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-o"]
    command += [str(path.with_suffix(".so")), str(path.with_suffix(".cpp"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return ctypes.CDLL(str(path.with_suffix(".so")))


def _launched(library, given, grid, threadgroup, output_shapes, output_dtypes) -> list[mx.array]:
    shapes = [np.array(array.shape, np.int32) for array in given]
    strides = [np.array([s // a.itemsize for s in a.strides], np.int64) for a in given]
    # Poison: what the kernel does not write is not a number.
    found = [
        np.full(shape, np.iinfo(WORDS[t.size]).max, WORDS[t.size])
        for shape, t in zip(output_shapes, output_dtypes, strict=True)
    ]

    def pointers(arrays):
        return (ctypes.c_void_p * len(arrays))(*[array.ctypes.data for array in arrays])

    sizes = [(ctypes.c_int * 3)(*size) for size in (grid, threadgroup)]
    library.run(*map(pointers, (given, shapes, strides, found)), *sizes)
    return [mx.array(a).view(t) for a, t in zip(found, output_dtypes, strict=True)]


def _spread(array: mx.array, gaps: bool, contiguous: bool) -> np.ndarray:
    """The array's bits with room between its rows, as in a cache that has space to grow."""
    words = np.array(array.view(getattr(mx, f"uint{8 * array.itemsize}")))
    if array.ndim != 4 or contiguous:
        return np.ascontiguousarray(words)
    b, h, t, w = words.shape
    room = np.full((b, h + 1, t + 3, w * (1 + gaps)), np.iinfo(words.dtype).max, words.dtype)
    room[:, :h, :t, :w] = words
    return room[:, :h, :t, :w]
