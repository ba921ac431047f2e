"""The sensitivity of the model to each format of each layer's keys and values.

The keys or the values of each layer are quantized alone at one format, the anchor, and the KL
divergence of the final logits is measured over all positions of the sequences. For the other
formats it is scaled by how much they change that layer's output, relative to the anchor: this runs
only one layer. Keys are also measured transformed, as their moments on the same text say.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from ... import distributed
from ..._status import note
from ...errors import UnsupportedError
from ...planning.journal import Journal
from ..formats import Affine, Format, KeyTransform, to_json
from ..formats.affine import GROUP_SIZE, candidates
from ..key_statistics import pieces, transforms
from ..layout import Mounted, Slot, owners
from ..mounting import attends_itself
from ..plan import RECENT_TOKENS, LayerFormat, sinks_of
from .replay import Replay

#: Bits of the anchor: few enough for an effect above rounding noise.
ANCHOR = 3
#: Bits beyond which each further bit is taken to quarter the error, as in a uniform quantizer.
FINEST = 4
#: Version of the measurements; raised when formats are measured in another way.
VERSION = 4
#: Tokens of context over which the bits of tokens in 16 bits are spread.
CONTEXT = 2048
#: Under which a journal keeps that everything of a model is in it.
COMPLETE = "complete"

#: A decoder layer and whether it is its keys ("k") or values ("v").
Side = tuple[int, str]


@dataclass(frozen=True)
class KVSensitivity:
    """Measurements of a model's keys and values.

    Attributes:
        slots: Decoder layer -> the caches that it writes to, mostly one.
        shapes: Side -> (1, heads, positions, dim) of each of them at the measured length.
        kl: Side -> format -> expected KL in nats per token.
        held_out: Runs to judge whole plans on.
        context: Tokens of context that plans are made for.
    """

    slots: Mapping[int, tuple[Slot, ...]]
    shapes: Mapping[Side, list[tuple[int, ...]]]
    kl: Mapping[Side, Mapping[Affine, float]]
    held_out: list[Replay]
    context: int = CONTEXT

    def elements(self, side: Side) -> int:
        """Elements of one side at the measured length."""
        return sum(math.prod(shape) for shape in self.shapes[side])

    def bits_per_element(self, choice: Mapping[Side, Format]) -> float:
        """Stored bits per element of a whole choice."""
        total = sum(self.elements(side) for side in choice)
        return sum(self.stored(side, format) for side, format in choice.items()) / total

    def stored(self, side: Side, format: Format) -> float:
        """Bits of one side, with its share of first keys and last tokens, which take 16 bits."""
        kept = RECENT_TOKENS + (sinks_of(format) if side[1] == "k" else 0)
        return self.elements(side) * (format.bits_per_element + 16 * kept / self.context)

    def formats(self, choice: Mapping[Side, Format]) -> dict[Slot, LayerFormat]:
        """A choice as formats of the caches."""
        layers = as_layers(choice)
        return {slot: layers[layer] for layer in layers for slot in self.slots[layer]}


def measure(
    model: nn.Module,
    sequences: np.ndarray,
    held_out: np.ndarray,
    *,
    fitted: np.ndarray | None = None,
    journal: Journal | None = None,
    rotation: bool = True,
    context: int = CONTEXT,
    progress: bool = True,
) -> KVSensitivity:
    """Measure every affine format of every layer's keys and values.

    The processes of ``mlx.launch`` measure some layers each.

    Args:
        model: An mlx-lm model in the dtype to compute in.
        sequences: int32 (n, length) to measure on.
        held_out: int32 (n, length) to judge plans on.
        fitted: int32 (n, length) to fit transforms of keys to; None for ``sequences``.
        journal: Where measurements are kept and found; see `journal_of`. None keeps none.
        rotation: Whether to consider rotated formats and transformed keys.
        context: Tokens of context that plans are made for.
        progress: Whether to show a progress bar.

    Raises:
        UnsupportedError: No layer keeps keys and values that MLX can pack.
    """
    journal = Journal(None) if journal is None else journal
    found = owners(model)
    runs = [Replay(model, mx.array(sequence)[None], found) for sequence in sequences]
    slots: dict[int, tuple[Slot, ...]] = {}
    for slot, layer in found.items():
        slots[layer] = (*slots.get(layer, ()), slot)
    shapes = {
        (layer, which): [runs[0].shapes[slot][which == "v"] for slot in own]
        for layer, own in slots.items()
        for which in "kv"
    }
    shapes = {side: found for side, found in shapes.items() if candidates(_dims(found))}
    if not shapes:
        raise UnsupportedError(
            "no layer of this model keeps keys and values in groups that MLX can pack: leave "
            "--optiq-kv-budget out"
        )
    plain = {s: candidates(_dims(own), rotation=False)[0] for s, own in shapes.items()}
    layers = as_layers(plain)
    dense = attends_itself(model, {s: layers[n] for n in layers for s in slots[n]}, found)
    runs = [run.reading(dense=dense) for run in runs]
    text = sequences if fitted is None else fitted
    known = _transforms(model, found, text, shapes, dense=dense) if rotation else {}
    own: dict[Side, dict[Affine, float]] = {}
    for side in tqdm(
        distributed.share(list(shapes)), desc="Measuring keys and values", disable=not progress
    ):
        transform = known.get(side[0]) if side[1] == "k" else None
        formats = candidates(_dims(shapes[side]), rotation=rotation, transform=transform)
        own[side] = _measured(runs, slots[side[0]], side, formats, journal)
    journal.exchange()
    parts = {side: kl for part in distributed.gathered(own) for side, kl in part.items()}
    judges = [Replay(model, mx.array(s)[None], found).reading(dense=dense) for s in held_out]
    return KVSensitivity(slots, shapes, {side: parts[side] for side in shapes}, judges, context)


def _transforms(
    model: nn.Module,
    found: Mapping[Slot, int],
    sequences: np.ndarray,
    shapes: Mapping[Side, list[tuple[int, ...]]],
    *,
    dense: bool,
) -> dict[int, KeyTransform]:
    """Decoder layer -> the transform of its keys, from the text in pieces."""
    keys = LayerFormat(Affine(ANCHOR, transformed=True), None)
    formats = {slot: keys for slot, layer in found.items() if (layer, "k") in shapes}
    mounted = Mounted(formats, found, dense=dense, mergeable=False)
    known = transforms(model, mounted, pieces(sequences))
    return {found[slot]: transform for slot, transform in known.items()}


def journal_of(model: Mapping[str, Any], sequences: np.ndarray) -> Journal:
    """The journal of a model, named by what identifies it, on these sequences."""
    digest = hashlib.sha256(sequences.tobytes()).hexdigest()
    return Journal({**model, "kv": VERSION, "anchor": ANCHOR, "tokens": digest})


def _dims(shapes: list[tuple[int, ...]]) -> set[int]:
    return {shape[3] for shape in shapes}


def _measured(
    runs: list[Replay],
    slots: tuple[Slot, ...],
    side: Side,
    formats: list[Affine],
    journal: Journal,
) -> dict[Affine, float]:
    """KL of each format of one side, in nats per token."""
    known = {f: journal.get(_key(side, f)) for f in formats}
    if all(kl is not None for kl in known.values()):
        return {f: kl or 0.0 for f, kl in known.items()}

    def packed(format: Affine) -> dict[Slot, LayerFormat]:
        return dict.fromkeys(slots, as_layers({side: format})[side[0]])

    anchor = next(f for f in formats if f.bits == ANCHOR)
    kl = float(np.mean([run.divergence(packed(anchor)) for run in runs]))
    measured = {f: min(f.bits, FINEST) for f in formats}
    errors = _errors(formats, lambda f: runs[0].error(packed(f)))
    unit = errors[anchor]
    if not unit:
        note(
            "this model's layers cannot be run alone: KV formats are compared by the error of a "
            "uniform quantizer"
        )
        errors = {f: 4.0**-f.bits * (f.group_size or 64) ** 0.5 for f in errors}
        unit = errors[anchor]
    found = {
        f: kl * (errors[replace(f, bits=bits)] or 0.0) / unit * 4.0 ** (bits - f.bits)
        for f, bits in measured.items()
    }
    journal.add_all((_key(side, format), kl) for format, kl in found.items())
    return found


def _errors(formats: list[Affine], error: Callable[[Affine], float]) -> dict[Affine, float]:
    """Errors of the formats up to `FINEST`; other groups than the first are run at the anchor."""
    size = formats[0].group_size or GROUP_SIZE
    coarse = [f for f in formats if f.bits <= FINEST]
    found = {f: error(f) for f in coarse if f.bits == ANCHOR or f.group_size == size}
    for f in coarse:
        if f not in found:  # sizes of groups and bits act apart
            same, anchor = f.in_groups(size), replace(f, bits=ANCHOR)
            share = found[anchor] / (found[anchor.in_groups(size)] or 1.0)
            found[f] = found[same] * share
    return found


def _key(side: Side, format: Affine) -> list[Any]:
    return [*side, to_json(format)]


def as_layers(choice: Mapping[Side, Format]) -> dict[int, LayerFormat]:
    """Both sides of each layer together."""
    result: dict[int, LayerFormat] = {}
    for (layer, which), format in choice.items():
        known = result.get(layer, LayerFormat(None, None, recent_tokens=RECENT_TOKENS))
        result[layer] = replace(known, **{"keys" if which == "k" else "values": format})
        if which == "k":
            result[layer] = replace(result[layer], sink_tokens=sinks_of(format))
    return result
