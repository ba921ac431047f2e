"""Reading plans: our ``optiq_metadata.json``, edited or not, and mlx-optiq's published ones."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import files
from .._version import versions
from ..errors import InputError
from ..model.config import generates, is_embedding, place
from .candidates import Size, Tensor
from .plan import FILE, READ_FROM, Plan
from .precision import AFFINE, GROUP_SIZES, MODES, Precision


def read_entries(path: Path) -> dict[str, Precision]:
    """Layer path -> precision, as read from a file.

    Args:
        path: A file with ``per_layer``, or with ``optimization.per_layer`` as older ones have it.
            Of the folder of a converted model its ``optiq_metadata.json`` is read.

    Raises:
        InputError: The file is not such a plan; the message names the field.
    """
    path = _located(path)
    content = files.read_json(path)
    if isinstance(content, dict) and "per_layer" not in content:
        content = content.get("optimization")
    entries = content.get("per_layer") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{path} has no per_layer: give an optiq_metadata.json as convert writes")
    return {name: _precision(path, name, entry) for name, entry in entries.items()}


def _located(path: Path) -> Path:
    """The file of a plan that may be named by its folder."""
    if not path.is_dir():
        return path
    if not (path / FILE).exists():
        raise InputError(
            f"{path} has no {FILE}: name a folder that convert wrote by plan, or a file"
        )
    return path / FILE


def _precision(path: Path, name: str, entry: Any) -> Precision:
    entry = entry if isinstance(entry, dict) else {}
    bits, group_size, mode = (
        entry.get(field, default)
        for field, default in (("bits", None), ("group_size", 64), ("mode", AFFINE))
    )
    if not isinstance(mode, str) or mode not in MODES:
        names = ", ".join(MODES)
        raise InputError(
            f"{path}: mode of {name} is {files.shown(mode)}, which MLX lacks: give {names}"
        )
    for field, value in (("bits", bits), ("group_size", group_size)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(
                f"{path}: {field} of {name} is {files.shown(value)}: give a whole number"
            )
    assert isinstance(bits, int)
    assert isinstance(group_size, int)
    if group_size == 0 or bits in (16, 32):
        return Precision(bits, 0)
    precision = Precision(bits, group_size, mode)
    if not precision.exists:
        raise InputError(
            f"{path}: {name} has {bits} bits in groups of {group_size}, which MLX's mode {mode} "
            f"lacks: give {_either(MODES[mode].bits)} bits and groups of "
            f"{_either(MODES[mode].group_sizes)}"
        )
    return precision


def _either(values: tuple[int, ...]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def read_plan(path: Path, tensors: tuple[Tensor, ...], size: Size) -> Plan:
    """Read a plan for a model.

    Names may have another wrapper's prefix. ``lm_head`` of a model whose head is its embedding is
    the embedding. A tensor that the file does not name gets the highest bits in it, as mlx-optiq
    gives them to the models that it publishes, or those of the model's own predicate if they are
    higher; a note of the plan says so.

    Args:
        path: See `read_entries`.
        tensors: The model's quantizable tensors.
        size: The model's counts.

    Returns:
        A plan without measurements.

    Raises:
        InputError: The file is not a plan, names a layer that the model lacks, or has a group size
            that does not divide a layer's inputs.
    """
    path = _located(path)
    entries, precisions = read_entries(path), {}
    for name, tensor in _tensors(path, entries, tensors).items():
        precision = entries[name]
        if not precision.fits(tensor.shape):
            raise InputError(
                f"{path}: {name} has {tensor.shape[-1]} inputs, which groups of "
                f"{precision.group_size} do not divide: give a smaller group_size"
            )
        precisions[tensor.path] = precision if precision.quantized else tensor.unquantized
    notes = []
    left = [t for t in tensors if t.path not in precisions]
    if left:
        highest = _highest(entries.values())
        precisions |= {t.path: _fitting(t, highest) for t in left}
        notes.append(
            f"{path.name} does not name {len(left)} of {len(tensors)} tensors, such as "
            f"{left[0].path}: they get its highest bits, {highest}"
        )
    precisions = {t.path: precisions[t.path] for t in tensors}
    stored = sum(t.stored_bits(precisions[t.path]) for t in tensors)
    achieved = size.bits_per_weight(stored)
    return Plan(
        precisions=precisions,
        sensitivities=dict.fromkeys(precisions, 0.0),
        method=f"{READ_FROM}{path.name}",
        target_bpw=round(achieved, 4),
        achieved_bpw=achieved,
        variant="from a file",
        versions=versions(),
        notes=tuple(notes),
    )


def _tensors(path: Path, names: Iterable[str], tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Which tensor each name of a file means; names of what text models lack are left out."""
    known = {t.path: t for t in tensors}
    found: dict[str, Tensor] = {}
    head = None
    for name in names:
        own = place(name, known)
        if own is not None:
            found[name] = known[own]
        elif name.removesuffix(".weight").rpartition(".")[2] == "lm_head":
            head = name
        elif generates(name):
            raise _unknown(path, name)
    if head is not None:
        embedding = next((t for t in tensors if is_embedding(t.path)), None)
        if embedding is None:
            raise _unknown(path, head)
        if embedding not in found.values():
            found[head] = embedding  # both are one matrix
    return found


def _unknown(path: Path, name: str) -> InputError:
    return InputError(
        f"{path} names {name}, which this model does not have or cannot quantize: was the plan "
        "made for another model?"
    )


def _highest(precisions: Iterable[Precision]) -> Precision:
    """The commonest of the precisions with the most bits."""
    counts = Counter(precisions)
    return max(counts, key=lambda p: (p.bits, counts[p], p))


def _fitting(tensor: Tensor, precision: Precision) -> Precision:
    """A precision for a tensor, with fewer inputs a group or unquantized where it must be."""
    floor = tensor.own
    if floor is not None and floor.bits > precision.bits:
        precision = floor
    if not precision.quantized:
        return tensor.unquantized
    smaller = (Precision(precision.bits, g) for g in sorted(GROUP_SIZES, reverse=True))
    choices = (precision, *(p for p in smaller if p.group_size < precision.group_size))
    return next((p for p in choices if p.exists and p.fits(tensor.shape)), tensor.unquantized)
