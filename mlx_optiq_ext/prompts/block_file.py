"""One block on disk: a safetensors file with its key and a checksum of all its bytes."""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import files
from ..errors import InputError

#: Bytes of the largest file that is read.
LARGEST = 4 << 30

SUFFIX = ".safetensors"
#: Ends the name of a file that is being written.
PART = ".part"

_NO_SUM = "0" * 64
_NAMES = {
    "bool": "BOOL",
    **{
        f"{sign}int{bits}": f"{short}{bits}"
        for sign, short in (("", "I"), ("u", "U"))
        for bits in (8, 16, 32, 64)
    },
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Piece:
    """What a block holds.

    Attributes:
        key: Its key.
        arrays: Name -> dtype as MLX names it, and the elements. bfloat16 is held as uint16.
        notes: JSON values that are needed beside the arrays.
    """

    key: str
    arrays: Mapping[str, tuple[str, np.ndarray]]
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(array.nbytes for _, array in self.arrays.values())


def held(array: mx.array) -> tuple[str, np.ndarray]:
    """The elements of an array for a `Piece`, which keeps them; evaluates it.

    Nothing is copied. MLX copies an array that others hold before it writes to it.
    """
    dtype = str(array.dtype).rpartition(".")[2]
    # An array of its own: the caller may assign to the other.
    array = array.view(mx.uint16) if dtype == "bfloat16" else array[...]
    mx.eval(array)
    return dtype, np.array(array, copy=False)


def restored(dtype: str, elements: np.ndarray) -> mx.array:
    """Undo `held`."""
    array = mx.array(elements)
    return array.view(mx.bfloat16) if dtype == "bfloat16" else array


def write(path: Path, piece: Piece) -> int:
    """Write a block beside its place and move it there; returns the file's bytes.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    header: dict[str, Any] = {
        "__metadata__": {"key": piece.key, "notes": json.dumps(piece.notes), "sum": _NO_SUM}
    }
    begin, bodies = 0, []
    for name, (dtype, array) in piece.arrays.items():
        bodies.append(array.tobytes())
        end = begin + len(bodies[-1])
        entry = {"dtype": _NAMES[dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
        header[name], begin = entry, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little")
    digest = _sum(start, text, *bodies)
    text = text.replace(_NO_SUM.encode(), digest.encode(), 1)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.writelines((start, text, *bodies))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return len(start) + len(text) + begin


def read(path: Path, key: str) -> Piece:
    """Read a block and check it.

    Raises:
        InputError: The file is missing, damaged, incomplete, or another block's.
    """
    content = files.read_bytes(path, LARGEST)
    length = int.from_bytes(content[:8], "little")
    if not 2 <= length <= len(content) - 8:
        raise InputError(f"{path} is no block of a prompt cache: it is left out")
    text, body = content[8 : 8 + length], memoryview(content)[8 + length :]
    header = files.parse_header(text, str(path), len(body))
    digest = header.metadata.get("sum", "")
    blank = text.replace(digest.encode(), _NO_SUM.encode(), 1) if len(digest) == 64 else b""
    if _sum(content[:8], blank, body) != digest or header.metadata.get("key") != key:
        raise InputError(f"{path} is damaged or another block's: it is left out")
    arrays, begin = {}, 0
    for name, tensor in header.tensors.items():
        dtype = _DTYPES.get(tensor.dtype, "")
        kind = {"bfloat16": "uint16", "bool": "bool_"}.get(dtype, dtype)
        if not kind:
            raise InputError(f"{path} holds {tensor.dtype}, which no block does: it is left out")
        flat = np.frombuffer(body[begin : begin + tensor.nbytes], dtype=kind)
        arrays[name] = dtype, flat.reshape(tensor.shape)
        begin += tensor.nbytes
    notes = files.parse_json(header.metadata.get("notes", "{}"), str(path), files.REQUEST)
    return Piece(key, arrays, notes)


def _sum(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
