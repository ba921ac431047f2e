"""Headers of safetensors files, checked against the file before any tensor is read.

Format: huggingface/safetensors, README: a little-endian u64 length, that many bytes of JSON with
``dtype``, ``shape`` and ``data_offsets`` of each tensor and string ``__metadata__``, then the
tensors one after another without gaps.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError
from .documents import Limits, parse_json
from .fields import Fields, shown
from .reading import MEGABYTE, open_regular

#: A shard with the experts of a layer apart takes a few megabytes.
LIMITS = Limits(size=32 * MEGABYTE, memory=320 * MEGABYTE)

#: Characters of a tensor's name, and its dimensions.
NAME, DIMENSIONS = 500, 16

#: dtype -> bits of an element.
DTYPES = {
    "BOOL": 8,
    **{f"{kind}{bits}": bits for kind in "UI" for bits in (8, 16, 32, 64)},
    **{"F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: its dtype as safetensors names it, its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class TensorHeader:
    """The tensors that a file declares, by name, and its metadata."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_header(path: Path, most: int | None = None) -> TensorHeader:
    """The header of a safetensors file.

    Args:
        path: The file.
        most: Tensors that are expected at most: a header that is too long for so many is not read.

    Raises:
        InputError: The file is missing, cut off, no safetensors, or its header does not fit it.
    """
    with open_regular(path) as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) != 8 or length < 2:
            raise InputError(f"{path} has no safetensors header: is the download complete?")
        whole = os.fstat(stream.fileno()).st_size
        largest = LIMITS.size if most is None else min(LIMITS.size, MEGABYTE + 2 * NAME * most)
        if length > min(whole - 8, largest):
            raise InputError(
                f"{path} has no safetensors header, or one of {length:,} bytes: is the download "
                "complete?"
            )
        return parse_header(_read(stream, length, path), str(path), whole - 8 - length)


def _read(stream: BinaryIO, length: int, path: Path) -> bytes:
    body = stream.read(length)
    if len(body) != length:
        raise InputError(f"{path} is cut off: is the download complete?")
    return body


def parse_header(body: bytes, where: str, room: int) -> TensorHeader:
    """The JSON of a header.

    Args:
        body: The JSON.
        where: The file, for messages.
        room: Bytes that follow it.

    Raises:
        InputError: The header is malformed, or does not match the number of bytes.
    """
    content = dict(Fields.of(parse_json(body, where, LIMITS), f"the header of {where}").entry)
    metadata = content.pop("__metadata__", None) or {}  # older MLX writes null
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{where}: __metadata__ is no table of strings: fetch the file again")
    found: dict[str, StoredTensor] = {}
    places: list[tuple[int, int]] = []
    for name, entry in content.items():
        if not 0 < len(name) <= NAME:
            raise InputError(f"{where}: {shown(name)} is no name of a tensor: fetch it again")
        tensor, begin = _tensor(entry, f"{where}: {name}")
        found[name] = tensor
        places.append((begin, begin + tensor.nbytes))
    end = 0
    for begin, after in sorted(places):
        if begin != end:
            raise InputError(
                f"{where}: its tensors overlap or leave a hole at byte {min(begin, end)}: the file "
                "is damaged, fetch it again"
            )
        end = after
    if end != room:
        raise InputError(
            f"{where} holds {room:,} bytes of tensors where its header says {end:,}: was the "
            "download or the conversion interrupted?"
        )
    return TensorHeader(found, metadata)


def _tensor(entry: Any, where: str) -> tuple[StoredTensor, int]:
    """A tensor, and the offset of its first byte."""
    fields = Fields.of(entry, where)
    dtype = entry.get("dtype")
    bits = DTYPES.get(dtype) if type(dtype) is str else None
    if bits is None:
        raise fields.refusal("dtype", f"one of {', '.join(DTYPES)}")
    shape, offsets = _whole(fields, "shape"), _whole(fields, "data_offsets")
    if len(shape) > DIMENSIONS:
        raise fields.refusal("shape", f"at most {DIMENSIONS} dimensions")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fields.refusal("data_offsets", "where its bytes begin and end")
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * bits != 8 * nbytes:
        raise InputError(
            f"{where} has {nbytes:,} bytes, which {dtype} of shape {list(shape)} does not take: "
            "the file is damaged, fetch it again"
        )
    return StoredTensor(dtype, shape, nbytes), offsets[0]


def _whole(fields: Fields, name: str) -> tuple[int, ...]:
    found = fields.entry.get(name)
    if type(found) is not list or not all(type(n) is int and 0 <= n < 1 << 48 for n in found):
        raise fields.refusal(name, "a list of whole numbers from 0 on")
    return tuple(found)
