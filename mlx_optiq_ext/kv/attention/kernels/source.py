"""Source text of the decoding kernels for a family of shapes."""

import struct
from dataclasses import dataclass
from pathlib import Path

from ....kernels import PLACES, TYPES, header, text
from ...formats import CodeLayout

#: Warps of a block; each takes every eighth tile of 16 tokens.
WARPS = 8
#: Rows of a product's right factor.
TILE = 8

#: What a kernel reads and writes, in the order of its arguments.
PARTS = ("k_codes", "k_scales", "k_biases", "v_codes", "v_scales", "v_biases")
DECODE = (("queries", *PARTS, "mask", "residuals", "starts"), ("states", "parts"))
STACKED = (("queries", "codes", "words", *DECODE[0][7:]), DECODE[1])
NEAR = ("queries", "mask", "near_keys", "near_values", "starts")
COMBINE = (("states", "parts", "sinks", *NEAR), ("out",))

MASKS = {"none": 0, "causal": 1, "bool": 2, "added": 3}
#: Source files of the decode kernel's header, in this order, behind the platform's and constants.
HEADERS = {
    "cuda": ("shared", "codes_cuda", "decode_cuda"),
    "metal": ("shared", "decode_metal"),
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
        sinks: Whether each head has an attention sink.
        firsts: Keys at the beginning of a row of which something was kept.
        recent: Tokens before each query, its own among them, that it sees as they were computed.
        ring: Whether these are in a sliding window, which one token may come to.
        dtype: Dtype of the scales, a key of `TYPES`.
        out: Type of the output.
        stacked: Whether keys and values lie in one stack, see `Stack`.
    """

    keys: CodeLayout
    values: CodeLayout
    repeats: int
    length: int
    scale: float
    mask: str
    sinks: bool
    firsts: int
    dtype: str
    out: str
    stacked: bool = False
    recent: int = 0
    ring: bool = False

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
    others = (source(f"{name}.h") for name in HEADERS[platform])
    parts = [header(platform), constants(family, platform), *others]
    return "\n".join(parts), source(f"decode_{platform}.body")


def combine(family: Family, platform: str, *, rotated: bool) -> tuple[str, str]:
    """Header and body of the kernel that joins the splits; of rotated values it rotates back."""
    parts = [header(platform), constants(family, platform), source("shared.h")]
    parts += [f"#define V_ROTATED {int(rotated)}", root("V", family.values.dim), source("turn.h")]
    parts.append(f"#define NEAR {int(family.recent > 0)}")
    return "\n".join(parts), PLACES[platform] + source("combine.body")


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
        "FIRSTS": family.firsts,
        "RECENT": family.recent,
        "RING": int(family.ring),
    }
    lines = [
        "namespace family {}",
        f"#define STACKED {int(family.stacked)}",
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


def source(name: str) -> str:
    """One of the source files beside this module."""
    return text(Path(__file__).parent / name)


def root(prefix: str, dim: int) -> str:
    """The unit of a Hadamard matrix of ``dim`` rows, as source text."""
    return f"constexpr CONSTANT float {prefix}_ROOT = {dim**-0.5!r}f;"
