"""Reading plans: our ``optiq_metadata.json``, edited or not, and mlx-optiq's published ones."""

from pathlib import Path
from typing import Any

from .. import files
from .._version import versions
from ..errors import InputError
from .candidates import Size, Tensor
from .plan import READ_FROM, Plan
from .precision import AFFINE, MODES, Precision


def read_entries(path: Path) -> dict[str, Precision]:
    """Layer path -> precision as a file has them.

    Args:
        path: A file with ``per_layer``, or with ``optimization.per_layer`` as older ones have it.

    Raises:
        InputError: The file is not such a plan; the message names the field.
    """
    content = files.read_json(path)
    if isinstance(content, dict) and "per_layer" not in content:
        content = content.get("optimization")
    entries = content.get("per_layer") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{path} has no per_layer: give an optiq_metadata.json as convert writes")
    return {name: _precision(path, name, entry) for name, entry in entries.items()}


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

    Args:
        path: See `read_entries`.
        tensors: The model's quantizable tensors.
        size: Of the model.

    Returns:
        A plan without measurements. A tensor that the file does not name stays unquantized.

    Raises:
        InputError: The file is not a plan, names a layer that the model lacks, or has a group size
            that does not divide a layer's inputs.
    """
    known = {t.path: t for t in tensors}
    precisions = {t.path: t.unquantized for t in tensors}
    for name, precision in read_entries(path).items():
        tensor = known.get(_layer(name, known))
        if tensor is None:
            raise InputError(
                f"{path} names {name}, which this model does not have or cannot quantize: was the "
                "plan made for another model?"
            )
        if not precision.fits(tensor.shape):
            raise InputError(
                f"{path}: {name} has {tensor.shape[-1]} inputs, which groups of "
                f"{precision.group_size} do not divide: give a smaller group_size"
            )
        precisions[tensor.path] = precision if precision.quantized else tensor.unquantized
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
    )


def _layer(name: str, known: dict[str, Tensor]) -> str:
    """The model's path for a name that may lack or have a wrapper's prefix."""
    if name in known:
        return name
    matches = [path for path in known if path.endswith(f".{name}") or name.endswith(f".{path}")]
    return matches[0] if len(matches) == 1 else name
