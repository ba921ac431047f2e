"""Reads a PyTorch ``.pt`` file without PyTorch, and without running any of its code.

Such a file is a zip archive: ``data.pkl`` pickles the object tree, and each tensor's bytes lie in
an entry of their own. The pickle is interpreted, never loaded; sizes are compared with the file's
before memory of that size is allocated.
Format: torch.save's zip layout (``data.pkl``, ``data/<key>``).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ... import files
from ...errors import InputError
from . import zip_archive
from .pickled import interpret
from .torch_objects import Damaged, Record, Refused, Tensor

#: PyTorch's storage classes -> numpy type.
TYPES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": np.uint16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.uint8,
}

#: Most bytes of ``data.pkl``; that of a YOLO26x takes less than one megabyte.
PICKLE_BYTES = 16 << 20

#: Modules and tensors of a network, and characters of a tensor's name.
PARTS, NAME = 100_000, 500

#: Most bytes of tensors with repeated data, beyond the file's size.
REPEATED_BYTES = 16 << 20


def read(path: Path) -> tuple[dict[str, mx.array], dict[int, str] | None]:
    """Read the tensors of a checkpoint.

    Args:
        path: A file of ``torch.save``: an Ultralytics checkpoint, or a plain state dict.

    Returns:
        Tensors by Ultralytics' names (the averaged ones where the file has both), and the class
        names if it has them.

    Raises:
        InputError: The file is not a checkpoint, is truncated, or asks for code to be run.
    """
    with files.open_regular(path) as stream:
        try:
            weights, names = _read(stream)
        except Refused as error:
            raise InputError(
                f"{path} asks for {error} while it is read: no YOLO checkpoint needs that, and "
                "nothing was run. Save its weights as .safetensors with a tool that you trust"
            ) from error
        except Damaged as error:
            raise InputError(
                f"{path} is not a whole PyTorch file of torch.save's zip format ({error}): "
                "download it again, or save it as .safetensors"
            ) from error
    if not weights:
        raise InputError(f"{path} holds no weights: give a YOLO26 checkpoint of Ultralytics")
    return weights, class_names(names)


def _read(stream: BinaryIO) -> tuple[dict[str, mx.array], Any]:
    entries = zip_archive.entries(stream)
    if any(entry.deflated for entry in entries.values()):
        raise Damaged("a compressed entry, which torch.save does not write")
    pickled = next((name for name in entries if name.rpartition("/")[2] == "data.pkl"), None)
    if pickled is None:
        raise Damaged("no data.pkl in it")
    if entries[pickled].size > PICKLE_BYTES:
        raise Damaged("its data.pkl is too large")
    folder = f"{pickled.removesuffix('data.pkl')}data/"
    stored = {
        name.removeprefix(folder): entry
        for name, entry in entries.items()
        if name.startswith(folder)
    }
    sizes = {key: entry.size for key, entry in stored.items()}
    model = _model(interpret(zip_archive.content(stream, entries[pickled]), sizes))
    if isinstance(model, Record):
        found, names = dict(_state(model)), model.state.get("names")
    else:
        pairs = model.items() if isinstance(model, dict) else ()
        found, names = {str(k): v for k, v in pairs if isinstance(v, Tensor)}, None
    nbytes = sum(t.elements * np.dtype(TYPES[t.storage.kind]).itemsize for t in found.values())
    if nbytes > stream.seek(0, 2) + REPEATED_BYTES:
        raise Damaged("its tensors are larger than the file")
    return dict(_arrays(stream, stored, found)), names


def _model(tree: Any) -> Any:
    """The network or the state dict in the saved object."""
    if not isinstance(tree, dict):
        return tree
    averaged = tree.get("ema")
    model = averaged if averaged is not None else tree.get("model", tree)
    return model if model is not tree else tree.get("state_dict", tree)


def _state(root: Record) -> Iterator[tuple[str, Tensor]]:
    """The state dict of a pickled ``torch.nn.Module``."""
    waiting, left = [(root, "")], PARTS
    while waiting:
        module, prefix = waiting.pop()
        children: list[tuple[Record, str]] = []
        for field in ("_parameters", "_buffers", "_modules"):
            found = module.state.get(field)
            for part, value in found.items() if isinstance(found, dict) else ():
                name, left = f"{prefix}{part}", left - 1
                if left < 0 or len(name) > NAME:
                    raise Damaged("its modules contain each other")
                if field != "_modules" and isinstance(value, Tensor):
                    yield name, value
                elif field == "_modules" and isinstance(value, Record):
                    children.append((value, f"{name}."))
        waiting.extend(reversed(children))


def _arrays(
    stream: BinaryIO, stored: Mapping[str, zip_archive.Entry], found: Mapping[str, Tensor]
) -> Iterator[tuple[str, mx.array]]:
    held, data = None, np.empty(0)
    made: dict[str, mx.array] = {}
    # One storage at a time: several tensors may share it.
    for name in sorted(found, key=lambda name: found[name].storage.order):
        storage = found[name].storage
        if held != storage.order:
            held = storage.order
            whole = zip_archive.content(stream, stored[storage.key])
            data = np.frombuffer(whole, TYPES[storage.kind])
        made[name] = _array(data, found[name])
    return ((name, made[name]) for name in found)


def _array(data: np.ndarray, tensor: Tensor) -> mx.array:
    strides = [step * data.itemsize for step in tensor.stride]
    start = data[tensor.offset :] if tensor.elements else data[:0]
    view = np.lib.stride_tricks.as_strided(start, tensor.shape, strides)
    view = np.ascontiguousarray(view).reshape(tensor.shape)
    if tensor.storage.kind == "BFloat16Storage":
        return mx.array(view).view(mx.bfloat16)
    if tensor.storage.kind == "BoolStorage":
        return mx.array(view != 0)
    return mx.array(view.astype(np.float32) if view.dtype == np.float64 else view)


def class_names(names: Any) -> dict[int, str] | None:
    """Class names as a dict of index to name, or None if they are anything else."""
    pairs = list(enumerate(names)) if isinstance(names, list | tuple) else None
    if isinstance(names, Mapping):
        pairs = list(names.items())
    if not pairs or not all(isinstance(k, int) and isinstance(v, str) for k, v in pairs):
        return None
    return dict(pairs)
