"""The precision of each layer's keys and values."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from .. import files
from ..errors import InputError
from . import formats, transform_file
from .formats import Affine, Format, KeyTransform, registry

#: File beside a model that ``auto`` reads.
FILE = "kv_config.json"
#: Width that means "as the model computes them".
UNPACKED = 16
#: First tokens of a sequence whose keys stay as they are where keys are transformed, and the most.
SINK_TOKENS, MOST_SINKS = 1, 64
#: Last tokens of a sequence that stay as they are where keys are transformed, and the most.
RECENT_TOKENS, MOST_RECENT = 4, 64


@dataclass(frozen=True)
class LayerFormat:
    """Formats of one layer; None leaves that side unquantized.

    Attributes:
        keys: Of its keys.
        values: Of its values.
        sink_tokens: Tokens at the beginning of a sequence whose keys stay as they are computed.
        recent_tokens: Tokens at the end of it that stay so, counted from each query back.
    """

    keys: Format | None
    values: Format | None
    sink_tokens: int = 0
    recent_tokens: int = 0

    @cache  # noqa: B019 - formats and dimensions are few
    def fitted(self, key_dim: int, value_dim: int) -> "LayerFormat":
        """These formats, adapted to the head dimensions.

        Raises:
            UnsupportedError: A format cannot pack vectors of its dimension.
        """
        keys, values = self.keys, self.values
        return replace(
            self,
            keys=keys and keys.fitted(key_dim),
            values=values and values.fitted(value_dim),
        )

    def with_transform(self, transform: KeyTransform) -> "LayerFormat":
        """The same with this transform of keys, which must be affine and transformed."""
        assert isinstance(self.keys, Affine)
        return replace(self, keys=self.keys.with_transform(transform))

    def __str__(self) -> str:
        sinks = f"s{self.sink_tokens}" if self.sink_tokens else ""
        recent = f"n{self.recent_tokens}" if self.recent_tokens else ""
        return f"k{self.keys or UNPACKED}v{self.values or UNPACKED}{sinks}{recent}"


@dataclass(frozen=True)
class KVPlan:
    """The precision of each layer's keys and values.

    Attributes:
        source: Where the plan comes from, for messages.
        layers: Decoder layer -> formats. Layers not named stay as they are.
        everywhere: Formats of every layer that keeps keys and values, instead of ``layers``.
    """

    source: str
    layers: Mapping[int, LayerFormat] = field(default_factory=dict)
    everywhere: LayerFormat | None = None

    @property
    def packs(self) -> bool:
        """Whether the plan quantizes any layer."""
        formats = [*self.layers.values(), *([self.everywhere] if self.everywhere else [])]
        return any(each.keys or each.values for each in formats)

    @property
    def bits_per_element(self) -> float:
        """Mean stored bits of an element over the layers that the plan names; 16 if unquantized."""
        formats = [self.everywhere] if self.everywhere else list(self.layers.values())
        sides = [side for each in formats for side in (each.keys, each.values)]
        bits = [16.0 if side is None else side.bits_per_element for side in sides]
        return sum(bits) / len(bits) if bits else 16.0


def parse_spec(text: str) -> KVPlan | None:
    """A plan that is the same for all layers, from ``4``, ``k8v4`` or ``k8v4g32``.

    Keys of few bits are transformed first, and values of few bits rotated. A letter behind a width
    says otherwise: ``p`` is affine quantization alone, ``r`` rotates, ``x`` transforms keys of many
    bits too, ``t`` is TurboQuant, and registered formats bring their own.

    Returns None for what does not look like one.

    Raises:
        InputError: A format does not know the bits or the group size.
    """
    letter = f"[{letters}]?" if (letters := registry.letters()) else ""
    side = rf"(\d+)({letter})"
    match = re.fullmatch(rf"(?:{side}|k{side}v{side})(?:g(\d+))?", text)
    if match is None:
        return None
    *found, group = match.groups()
    widths = [(bits, letter) for bits, letter in zip(found[::2], found[1::2], strict=True) if bits]
    where, size = f"--optiq-kv {text}", None if group is None else int(group)
    sides = [
        None if int(bits) == UNPACKED else formats.from_spec(int(bits), letter, size, where)
        for bits, letter in widths
    ]
    keys, values = sides[0], sides[-1]
    if isinstance(values, Affine) and values.transformed:
        if len(sides) > 1:
            raise InputError(f"{where}: only keys are transformed: leave the x behind v out")
        values = replace(values, transformed=False)
    if keys is not None and not widths[0][1]:
        keys = keys.for_keys()
    if values is not None and not widths[-1][1]:
        values = values.for_values()
    return KVPlan(text, everywhere=LayerFormat(keys, values, sinks_of(keys), recent_of(keys)))


def sinks_of(keys: Format | None) -> int:
    """First tokens of a sequence that are worth their bytes beside keys of a format."""
    return SINK_TOKENS if isinstance(keys, Affine) and keys.transformed else 0


def recent_of(keys: Format | None) -> int:
    """Last tokens of a sequence that are worth their bytes beside keys of a format."""
    return RECENT_TOKENS if isinstance(keys, Affine) and keys.transformed else 0


def read_plan(path: Path) -> KVPlan:
    """Read a plan from a JSON list of layers, and the transforms of its keys from beside it.

    The published form is ``[{"layer_idx": 3, "bits": 8, "group_size": 64}, ...]``; ``k_bits``,
    ``v_bits``, ``k_group_size``, ``v_group_size``, ``k_rotated`` and ``v_rotated`` may tell keys
    from values. ``k_transformed`` keys without a file of transforms are fitted to the model.

    Raises:
        InputError: The file is missing or wrong; the message names the entry.
    """
    entries = files.read_json(path)
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
    return KVPlan(str(path), _with_transforms(layers, path.parent / transform_file.FILE))


def _with_transforms(layers: dict[int, LayerFormat], path: Path) -> dict[int, LayerFormat]:
    """Layers whose keys know their transforms, if there is a file of them."""
    wanted = [n for n, f in layers.items() if isinstance(f.keys, Affine) and f.keys.transformed]
    if not wanted or not path.exists():
        return layers
    found = transform_file.read(path, wanted)
    return layers | {n: layers[n].with_transform(found[n]) for n in wanted}


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


def _entry(index: int, layer: LayerFormat) -> dict[str, Any]:
    sides = {"k": layer.keys, "v": layer.values}
    kept = {"sink_tokens": layer.sink_tokens, "recent_tokens": layer.recent_tokens}
    kept = {name: count for name, count in kept.items() if count}
    known = [formats.to_json(format) for format in sides.values() if format is not None]
    if layer.keys == layer.values and not any(value is True for value in known[0].values()):
        shared = {name: value for name, value in known[0].items() if value is not False}
        return {"layer_idx": index, **shared, **kept}
    # Tools that read the published form see one width only: the larger one.
    widest = max(known, key=lambda fields: fields["bits"])
    entry = {
        "layer_idx": index,
        "bits": widest["bits"],
        "group_size": widest.get("group_size") or 64,
    }
    for side, format in sides.items():
        fields = {"bits": UNPACKED} if format is None else formats.to_json(format)
        entry |= {f"{side}_{name}": value for name, value in fields.items()}
    return entry | kept


def _layer_index(entry: Any, where: str) -> int:
    if not isinstance(entry, dict):
        raise InputError(f"{where} is not an object with layer_idx, bits and group_size")
    if unknown := set(entry) - _known_fields():
        raise InputError(f"{where} has unknown keys: {', '.join(sorted(unknown))[:80]}")
    index = entry.get("layer_idx")
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise InputError(f"{where}: layer_idx {files.shown(index)} is not a layer number from 0 on")
    return index


def _known_fields() -> set[str]:
    sides = {f"{side}{name}" for side in ("", "k_", "v_") for name in registry.fields()}
    return {"layer_idx", "sink_tokens", "recent_tokens", *sides}


def _layer(entry: Mapping[str, Any], where: str) -> LayerFormat:
    keys, values = (_side(entry, side, where) for side in ("k", "v"))
    if isinstance(values, Affine) and values.transformed:
        raise InputError(f"{where}: values cannot be transformed: say k_transformed, of keys")
    if keys is None and values is None:
        raise InputError(f"{where} quantizes neither keys nor values: leave the layer out")
    fields = files.Fields(dict(entry), where)
    sinks = fields.integer("sink_tokens", 0, MOST_SINKS, default=0)
    recent = fields.integer("recent_tokens", 0, MOST_RECENT, default=0)
    if sinks and keys is None:
        raise InputError(f"{where}: sink_tokens says nothing of keys that are not quantized")
    return LayerFormat(keys, values, sinks, recent)


def _side(entry: Mapping[str, Any], side: str, where: str) -> Format | None:
    """The format of one side; its own fields count before those of both."""
    given = {
        name: entry[key]
        for name in registry.fields()
        for key in (name, f"{side}_{name}")
        if key in entry
    }
    bits = given.get("bits")
    if bits == UNPACKED and not isinstance(bits, bool):
        return None
    return formats.from_json(given, where)
