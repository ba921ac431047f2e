"""Which precision each layer's keys and values get."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..turboquant.codebook import BITS as TURBO_BITS
from ..turboquant.format import TurboFormat
from .packed import BITS, GROUP_SIZES, AnyFormat, Format

#: File beside a model that ``auto`` reads.
FILE = "kv_config.json"
#: Width that means "as the model computes them".
UNPACKED = 16
#: How keys and values can be packed.
METHODS = ("affine", "turboquant")

_SPEC = re.compile(
    r"(?:(?P<both>\d+)(?P<how>[rt]?)|k(?P<k>\d+)(?P<kh>[rt]?)v(?P<v>\d+)(?P<vh>[rt]?))(?:g(?P<group>\d+))?"
)
_KEYS = {
    "layer_idx", "bits", "group_size", "k_bits", "v_bits", "k_group_size", "v_group_size",
    "k_rotated", "v_rotated", "method", "k_method", "v_method", "seed",
}  # fmt: skip


@dataclass(frozen=True)
class LayerFormat:
    """Formats of one layer; None keeps that side as the model computes it."""

    keys: AnyFormat | None
    values: AnyFormat | None

    def __str__(self) -> str:
        return f"k{self.keys or UNPACKED}v{self.values or UNPACKED}"


@dataclass(frozen=True)
class KVPlan:
    """The precision of each layer's keys and values.

    Attributes:
        source: Where it comes from, for messages.
        layers: Decoder layer -> formats. Layers not named stay as they are.
        everywhere: Formats of every layer that keeps keys and values, instead of ``layers``.
    """

    source: str
    layers: Mapping[int, LayerFormat] = field(default_factory=dict)
    everywhere: LayerFormat | None = None


def parse_spec(text: str) -> KVPlan | None:
    """A uniform plan from ``4``, ``k8v4`` or ``k8v4g32``.

    Behind a width, ``r`` rotates before packing and ``t`` is TurboQuant.

    Returns None for what does not look like one.

    Raises:
        InputError: It names bits or a group size that MLX cannot pack.
    """
    match = _SPEC.fullmatch(text)
    if match is None:
        return None
    found = match.groupdict()
    group = None if found["group"] is None else int(found["group"])
    where = f"--optiq-kv {text}"

    def side(bits: str, how: str) -> AnyFormat | None:
        if how == "t":
            return _turbo(int(bits), 0, where)
        return _format(int(bits), group, how == "r", where)

    if found["both"]:
        format = side(found["both"], found["how"])
        return KVPlan(text, everywhere=LayerFormat(format, format))
    formats = LayerFormat(side(found["k"], found["kh"]), side(found["v"], found["vh"]))
    return KVPlan(text, everywhere=formats)


def read_plan(path: Path) -> KVPlan:
    """Read a plan from a JSON list of layers.

    The published form is ``[{"layer_idx": 3, "bits": 8, "group_size": 64}, ...]``; ``k_bits``,
    ``v_bits``, ``k_group_size``, ``v_group_size``, ``k_rotated`` and ``v_rotated`` may tell keys
    from values.

    Raises:
        InputError: The file is missing or wrong; the message names the entry.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the name") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): it must be a list of layers") from error
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f'{path} must be a JSON list such as [{{"layer_idx": 0, "bits": 8, "group_size": 64}}]'
        )
    layers: dict[int, LayerFormat] = {}
    for number, entry in enumerate(entries):
        where = f"{path}, entry {number}"
        index = _layer_index(entry, where)
        if index in layers:
            raise InputError(f"{where}: layer_idx {index} is named twice: remove one of them")
        layers[index] = _layer(entry, where)
    return KVPlan(str(path), layers)


def check_layers(plan: KVPlan, count: int) -> None:
    """Raise InputError for a layer that a model of ``count`` decoder layers does not have."""
    for index in plan.layers:
        if index >= count:
            raise InputError(
                f"{plan.source}: layer_idx {index} is not in a model of {count} layers: "
                "is the plan another model's?"
            )


def entries(plan: Mapping[int, LayerFormat]) -> list[dict[str, Any]]:
    """The plan as the JSON list that `read_plan` reads, layers in order."""
    return [_entry(index, plan[index]) for index in sorted(plan)]


def _entry(index: int, formats: LayerFormat) -> dict[str, Any]:
    sides = {"k": formats.keys, "v": formats.values}
    known = [f for f in sides.values() if f is not None]
    widest = max(known, key=lambda f: f.bits)
    # Tools that read the published form only see one width: the safer one.
    entry: dict[str, Any] = {
        "layer_idx": index,
        "bits": widest.bits,
        "group_size": widest.group_size or 64,
    }
    turbo = [f for f in known if isinstance(f, TurboFormat)]
    if formats.keys == formats.values and turbo:
        return {
            "layer_idx": index,
            "bits": widest.bits,
            "method": METHODS[1],
            "seed": turbo[0].seed,
        }
    if turbo:
        entry["seed"] = turbo[0].seed
    if formats.keys != formats.values or any(isinstance(f, Format) and f.rotated for f in known):
        for side, found in sides.items():
            entry[f"{side}_bits"] = found.bits if found else UNPACKED
            if isinstance(found, TurboFormat):
                entry[f"{side}_method"] = METHODS[1]
            elif found:
                entry[f"{side}_group_size"] = found.group_size or 64
                entry[f"{side}_rotated"] = found.rotated
    return entry


def _layer_index(entry: Any, where: str) -> int:
    if not isinstance(entry, dict):
        raise InputError(f"{where} is not an object with layer_idx, bits and group_size")
    if unknown := set(entry) - _KEYS:
        raise InputError(f"{where} has unknown keys: {', '.join(sorted(unknown))}")
    index = entry.get("layer_idx")
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise InputError(f"{where}: layer_idx {index!r} is not a layer number from 0 on")
    return index


def _layer(entry: Mapping[str, Any], where: str) -> LayerFormat:
    sides: list[AnyFormat | None] = []
    for side in ("k", "v"):
        bits = entry.get(f"{side}_bits", entry.get("bits"))
        method = entry.get(f"{side}_method", entry.get("method", METHODS[0]))
        if method not in METHODS:
            names = " or ".join(f'"{name}"' for name in METHODS)
            raise InputError(f"{where}: method {method!r} is not known: use {names}")
        rotated = entry.get(f"{side}_rotated", False)
        if not isinstance(rotated, bool):
            raise InputError(f"{where}: {side}_rotated {rotated!r} is not true or false")
        if method == METHODS[0] or bits == UNPACKED:
            group = entry.get(f"{side}_group_size", entry.get("group_size", 64))
            sides.append(_format(bits, group, rotated, where))
        else:
            sides.append(_turbo(bits, entry.get("seed", 0), where))
    if sides == [None, None]:
        raise InputError(f"{where} packs neither keys nor values: leave the layer out")
    return LayerFormat(*sides)


def _format(bits: Any, group: Any, rotated: bool, where: str) -> Format | None:
    if bits == UNPACKED and not isinstance(bits, bool):
        return None
    if bits not in BITS or isinstance(bits, bool):
        raise InputError(f"{where}: bits {bits!r} is none of {', '.join(map(str, BITS))}")
    if group is not None and (group not in GROUP_SIZES or isinstance(group, bool)):
        names = ", ".join(map(str, GROUP_SIZES))
        raise InputError(f"{where}: group_size {group!r} is none of {names}")
    return Format(int(bits), group, rotated)


def _turbo(bits: Any, seed: Any, where: str) -> TurboFormat:
    if bits not in TURBO_BITS or isinstance(bits, bool):
        names = ", ".join(map(str, TURBO_BITS))
        raise InputError(f"{where}: TurboQuant bits {bits!r} is none of {names}")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"{where}: seed {seed!r} is not a number from 0 on")
    return TurboFormat(bits, seed)
