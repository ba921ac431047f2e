"""Compiles kernels with CUDA's own compiler, which needs no GPU.

The shim says what a kernel computes, not whether CUDA takes its source. The session ``cuda`` of the
noxfile installs NVRTC and sets ``MLX_OPTIQ_NVRTC``.
"""

import importlib
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx

TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.uint32: "uint32_t",
    mx.int32: "int32_t",
    mx.uint8: "uint8_t",
    mx.bool_: "bool",
}
#: The generation of GPUs to compile for: H100 and H200.
ARCHITECTURE = "sm_90"
#: What MLX puts before a kernel.
ABOVE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cuda/std/cmath>
#include <cuda/std/cstdint>
#include <cuda/std/limits>
#include <cooperative_groups.h>
using cuda::std::int32_t;
using cuda::std::int64_t;
using cuda::std::uint16_t;
using cuda::std::uint32_t;
using cuda::std::uint8_t;
namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, 10>;
using Strides = cuda::std::array<int64_t, 10>;
}
"""
#: What MLX gives a kernel of an input if its source names it.
PARTS = {"shape": "Shape", "strides": "Strides", "ndim": "int"}


def wanted() -> bool:
    """Whether kernels are to be compiled."""
    return bool(os.environ.get("MLX_OPTIQ_NVRTC"))


def check(
    header: str,
    source: str,
    inputs: Sequence[tuple[str, mx.Dtype]],
    outputs: Sequence[tuple[str, mx.Dtype]],
) -> None:
    """Compile a kernel as MLX puts it together.

    Raises:
        AssertionError: CUDA does not take it.
    """
    arguments = []
    for name, dtype in inputs:
        arguments.append(f"const {TYPES[dtype]}* {name}")
        for part, type_ in PARTS.items():
            if f"{name}_{part}" in source:
                arguments.append(f"const __grid_constant__ {type_} {name}_{part}")
    arguments += [f"{TYPES[dtype]}* {name}" for name, dtype in outputs]
    _compile(
        f"{ABOVE}\n{header}\nnamespace mlx::core::cu {{\nnamespace cg = cooperative_groups;\n"
        f"__global__ void kernel({', '.join(arguments)}) {{\n{source}\n}}\n}}\n"
    )


@cache
def _compile(text: str) -> None:
    nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")

    def done(found: tuple[Any, ...]) -> Any:
        code, *rest = found
        assert not code, nvrtc.nvrtcGetErrorString(code)
        return rest[0] if rest else None

    program = done(nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], []))
    options = [f"--gpu-architecture={ARCHITECTURE}", "--std=c++20", "-default-device"]
    options += [f"--include-path={folder}" for folder in _headers()]
    code, *_ = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    said = b" " * done(nvrtc.nvrtcGetProgramLogSize(program))  # is written into
    done(nvrtc.nvrtcGetProgramLog(program, said))
    assert not code, said.decode(errors="replace")[:4000]
    done(nvrtc.nvrtcDestroyProgram(program))


@cache
def _headers() -> list[str]:
    pathfinder: Any = importlib.import_module("cuda.pathfinder")
    return [pathfinder.find_nvidia_header_directory(name) for name in ("cudart", "cccl")]
