"""Source text of the decoding kernels for a family of shapes."""

import hashlib
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...formats import CodeLayout

#: Warps of a block; each takes every eighth tile of 16 tokens.
WARPS = 8
#: Rows of a product's right factor.
TILE = 8

#: What a kernel reads and writes, in the order of its arguments.
PARTS = ("k_codes", "k_scales", "k_biases", "v_codes", "v_scales", "v_biases")
DECODE = (("queries", *PARTS, "mask"), ("states", "parts"))
COMBINE = (("states", "parts", "sinks"), ("out",))

MASKS = {"none": 0, "causal": 1, "bool": 2, "added": 3}
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


#: Source files of the decode kernel's header, in this order; the constants follow the first one.
HEADERS = {
    "cuda": ("cuda", "shared", "codes_cuda", "decode_cuda"),
    "metal": ("metal", "shared", "decode_metal"),
}


@dataclass(frozen=True)
class Family:
    """Shapes that one compiled kernel serves.

    Attributes:
        keys: How keys are packed.
        values: How values are packed.
        repeats: Query heads of a key/value head.
        length: Queries of a head.
        scale: Factor on the scores.
        mask: A key of `MASKS`.
        sinks: Whether each head has a logit that gives nothing.
        dtype: Of the scales, a key of `TYPES`.
        out: Type of the output.
    """

    keys: CodeLayout
    values: CodeLayout
    repeats: int
    length: int
    scale: float
    mask: str
    sinks: bool
    dtype: str
    out: str

    @property
    def rows(self) -> int:
        """Queries of a key/value head."""
        return self.repeats * self.length

    @property
    def tiles(self) -> int:
        """Tiles of eight queries that a block holds: as many as its registers allow."""
        most = max(1, 256 // max(self.keys.dim, self.values.dim))
        return min(-(-self.rows // TILE), most)

    @property
    def chunks(self) -> int:
        """Blocks that share a key/value head's queries; one unless there are many."""
        return -(-self.rows // (TILE * self.tiles))

    @property
    def joiners(self) -> int:
        """Threads that share an element of the output when the splits are joined."""
        return min(8, 1024 // self.values.dim)


def decode(family: Family, platform: str) -> tuple[str, str]:
    """Header and body of the kernel that attends to one split of the sequence."""
    first, *others = (text(f"{name}.h") for name in HEADERS[platform])
    return "\n".join([first, constants(family, platform), *others]), text(f"decode_{platform}.body")


def combine(family: Family, platform: str) -> tuple[str, str]:
    """Header and body of the kernel that joins the splits."""
    header = [text(f"{platform}.h"), constants(family, platform), text("shared.h")]
    return "\n".join(header), PLACES[platform] + text("combine.body")


def constants(family: Family, platform: str) -> str:
    """The family's constants as source text."""
    names = TYPES[platform]
    numbers = {
        "REPEATS": family.repeats,
        "LENGTH": family.length,
        "ROWS": family.rows,
        "TILES": family.tiles,
        "CHUNKS": family.chunks,
        "MASK": MASKS[family.mask],
        "WARPS": WARPS,
        "JOINERS": family.joiners,
        "SINKS": int(family.sinks),
    }
    lines = [
        "namespace family {}",
        f"typedef {names[family.dtype]} T;",
        f"typedef {names[family.out]} OUT;",
    ]
    for prefix, side in (("K", family.keys), ("V", family.values)):
        numbers[f"{prefix}_DIM"] = side.dim
        numbers[f"{prefix}_BITS"] = side.bits
        numbers[f"{prefix}_GROUP"] = side.group_size
        numbers[f"{prefix}_CODEBOOK"] = int(bool(side.levels))
        lines.append(_levels(prefix, side.levels, platform))
    lines += [f"constexpr CONSTANT int {name} = {value};" for name, value in numbers.items()]
    lines.append(f"constexpr CONSTANT float SCALE = {float(family.scale)!r}f;")
    return "\n".join(lines) + "\n"


def _levels(prefix: str, levels: tuple[float, ...], platform: str) -> str:
    padded = (*levels, *(0.0 for _ in range(8 - len(levels))))
    if platform == "metal":
        values = ", ".join(f"{level!r}f" for level in padded)
        return f"constexpr CONSTANT float {prefix}_LEVELS[8] = {{{values}}};"
    # Low bytes of all levels in half precision, then high bytes: the order of byte look-ups.
    halves = [struct.pack("<e", level) for level in padded]
    packed = bytes(h[0] for h in halves) + bytes(h[1] for h in halves)
    words = ", ".join(f"{word:#x}u" for word in struct.unpack("<4I", packed))
    return f"#define {prefix}_LEVELS Levels{{{{{words}}}}}"


def name_of(*texts: object) -> str:
    """A name that tells kernels apart; MLX keeps compiled ones by name, on disk too."""
    return "optiq_" + hashlib.sha256("\0".join(map(str, texts)).encode()).hexdigest()[:20]


@cache
def text(name: str) -> str:
    """One of the source files beside this module, without comments: MLX copies it at every call."""
    lines = (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("//")) + "\n"
