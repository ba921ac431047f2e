"""Source text of kernels that CUDA and Metal have in common."""

import hashlib
from functools import cache
from pathlib import Path

TYPES = {
    "cuda": {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float"},
    "metal": {"float16": "half", "bfloat16": "bfloat16_t", "float32": "float"},
}

#: Where a thread is. In the body, because MLX looks there for the names that Metal has for it.
PLACES = {
    "cuda": "  const int thread_x = blockIdx.x * blockDim.x + threadIdx.x, block_y = blockIdx.y,\n"
    "    block_z = blockIdx.z;\n",
    "metal": "  const int thread_x = thread_position_in_grid.x,\n"
    "    block_y = threadgroup_position_in_grid.y, block_z = threadgroup_position_in_grid.z;\n",
}


def header(platform: str) -> str:
    """The words that kernels use for a platform's own, for the beginning of their headers."""
    return text(Path(__file__).parent / f"{platform}.h")


def name_of(*texts: object) -> str:
    """A name that tells kernels apart; MLX keeps compiled ones by name, on disk too."""
    return "optiq_" + hashlib.sha256("\0".join(map(str, texts)).encode()).hexdigest()[:20]


@cache
def text(path: Path) -> str:
    """A source file without its comments: MLX copies it at every call."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("//")) + "\n"
