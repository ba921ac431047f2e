"""Tensor names of YOLO26: Ultralytics' and yolo-mlx's, and the layout of convolution weights.

Both nest the same modules. yolo-mlx says ``layers`` and ``layer2`` where Ultralytics has bare
indices, and lays the class branches of the head out flat: two convolutions a block.
"""

import re
from collections.abc import Iterable, Mapping

import mlx.core as mx

from ...errors import InputError

#: Training state that yolo-mlx's networks do not have.
IGNORED = "num_batches_tracked"

#: Transpositions of a PyTorch weight to MLX's ``(out, height, width, in)``.
TORCH_AXES = {"conv": (0, 2, 3, 1), "conv_transpose": (1, 2, 3, 0)}


def canonical(name: str) -> str:
    """The common name of a tensor named by either package.

    ``model.23.cv3.0.1.0.bn.bias`` and ``model.layers.23.cv3.layer0.layers.2.bn.bias`` both become
    ``model.23.cv3.0.2.bn.bias``.
    """
    nested = ".layers." not in name
    parts = [part for part in name.split(".") if part != "layers"]
    plain = ".".join(re.sub(r"^(?:layer|psa)(?=\d)", "", part) for part in parts)
    return _NESTED.sub(_flat, plain) if nested else plain


#: A class branch of the head: its level, a block, and the block's layer except in the last block.
_NESTED = re.compile(r"((?:^|\.)(?:one2one_)?cv3\.\d+)\.(\d+)(?:\.(\d+))?(?=\.)")


def _flat(match: re.Match[str]) -> str:
    return f"{match[1]}.{2 * int(match[2]) + int(match[3] or 0)}"


def ultralytics(name: str) -> str:
    """Ultralytics' name of a canonical one; yolo-mlx reads these too."""
    match = re.match(r"(model\.\d+\.(?:one2one_)?cv3\.\d+)\.(\d+)\.(.+)", name)
    if match is None:
        return name
    branch, flat, rest = match[1], int(match[2]), match[3]
    # The last layer of a branch is a bare convolution, its own block.
    inner = f"{flat // 2}.{flat % 2}" if re.match(r"conv\.|bn\.", rest) else f"{flat // 2}"
    return f"{branch}.{inner}.{rest}"


def matched(
    weights: Mapping[str, mx.array],
    expected: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, str],
) -> dict[str, mx.array]:
    """Rename and transpose a checkpoint's tensors as a network expects them.

    Args:
        weights: Tensors by Ultralytics' or yolo-mlx's names, convolutions in either layout.
        expected: Name in the network -> shape.
        kinds: Name in the network -> ``conv`` or ``conv_transpose``, for convolution weights.

    Returns:
        Tensors by the network's names, all of ``expected`` except strides that the file lacks.

    Raises:
        InputError: A tensor is missing, unknown, named twice, or of another shape.
    """
    targets = {canonical(name): name for name in expected}
    found: dict[str, mx.array] = {}
    unknown = []
    for name, array in weights.items():
        if name.endswith(IGNORED):
            continue
        target = targets.get(canonical(name))
        if target is None:
            unknown.append(name)
        elif target in found:
            raise InputError(f"the file holds {name} under two names: save it again")
        else:
            found[target] = array
    missing = [name for name in expected if name not in found and not name.endswith("stride")]
    if missing or unknown:
        raise InputError(
            f"these are not the weights of this YOLO26: {_some(missing, 'missing')}"
            f"{_some(unknown, 'unknown')}check that the file is a whole YOLO26 checkpoint"
        )
    axes = TORCH_AXES if _is_torch_layout(found, expected, kinds) else {}
    for name, array in found.items():
        if array.ndim == 4 and axes:
            array = found[name] = array.transpose(*axes[kinds.get(name, "conv")])
        if tuple(array.shape) != expected[name]:
            raise InputError(
                f"{name} has shape {tuple(array.shape)}, this YOLO26 needs {expected[name]}: "
                "check that the file is a whole YOLO26 checkpoint"
            )
    return found


def _is_torch_layout(found, expected, kinds) -> bool:
    """Whether convolutions have PyTorch's layout; some shapes fit both layouts."""
    for name, array in found.items():
        if array.ndim == 4 and tuple(array.shape) != expected[name]:
            axes = TORCH_AXES[kinds.get(name, "conv")]
            return tuple(array.shape[axis] for axis in axes) == expected[name]
    return False


def _some(names: Iterable[str], what: str) -> str:
    names = list(names)
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'} {what}; "
