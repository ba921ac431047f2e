"""Reads a zip archive by its directory, within the sizes that the directory declares.

Entries must not overlap, so that all together are not larger than the file, and the inflated size
of an entry is checked before it is inflated.
Format: PKWARE's APPNOTE, 4.3.7 (local header), 4.3.12 (directory) and 4.3.14 to 4.3.16 (ends).
"""

import struct
import zlib
from dataclasses import dataclass, replace
from typing import BinaryIO

from .torch_objects import Damaged

#: Most entries, and most bytes of their directory; a YOLO26x with its optimizer has 5,000 entries.
ENTRIES, DIRECTORY_BYTES = 50_000, 8 << 20

_LOCAL = struct.Struct("<4s22x2H")
_CENTRAL = struct.Struct("<4s4x2H4x3I3H8xI")
_END = struct.Struct("<4s6xH2I2x")
_END64 = struct.Struct("<4s28x3Q")
_LOCATOR = struct.Struct("<4s4xQ4x")
_LONGEST_COMMENT = 0xFFFF
_DEFLATED = 8


@dataclass(frozen=True)
class Entry:
    """An entry.

    Attributes:
        name: Name in the directory.
        header: Offset of its local header.
        end: Offset of the next entry or of the directory.
        stored: Bytes in the file.
        size: Bytes after inflating.
        deflated: Whether it is compressed.
        checksum: CRC-32 of the inflated bytes.
    """

    name: bytes
    header: int
    end: int
    stored: int
    size: int
    deflated: bool
    checksum: int


def entries(stream: BinaryIO) -> dict[str, Entry]:
    """The entries of an archive by name.

    Raises:
        Damaged: The file is not a zip archive, is truncated or encrypted, or its entries overlap.
    """
    count, size, start = _directory(stream)
    if count > ENTRIES or size > DIRECTORY_BYTES:
        raise Damaged(f"a zip archive of {count:,} entries")
    stream.seek(start)
    data = stream.read(size)
    found: list[Entry] = []
    at = 0
    for _ in range(count):
        if len(data) - at < _CENTRAL.size:
            raise Damaged("its zip directory is cut off")
        sign, flags, method, checksum, packed, length, *rest = _CENTRAL.unpack_from(data, at)
        name_size, extra_size, comment_size, header = rest
        at += _CENTRAL.size
        name = data[at : at + name_size]
        if sign != b"PK\x01\x02":
            raise Damaged("its zip directory is damaged")
        extra = data[at + name_size : at + name_size + extra_size]
        length, packed, header = _wide(extra, length, packed, header)
        if method not in (0, _DEFLATED) or flags & 1 or (method == 0 and packed != length):
            raise Damaged("an entry that is encrypted, or compressed in an unknown way")
        found.append(Entry(name, header, 0, packed, length, method == _DEFLATED, checksum))
        at += name_size + extra_size + comment_size
    if at != len(data):
        raise Damaged("its zip directory has another size than its end says")
    return _apart(found, start)


def content(stream: BinaryIO, entry: Entry) -> bytes:
    """The bytes of an entry.

    Raises:
        Damaged: The bytes are truncated or altered.
    """
    stream.seek(entry.header)
    local = stream.read(_LOCAL.size)
    if len(local) != _LOCAL.size or local[:4] != b"PK\x03\x04":
        raise Damaged("an entry is not where its zip directory says")
    _, name_size, extra_size = _LOCAL.unpack(local)
    start = entry.header + _LOCAL.size + name_size + extra_size
    if stream.read(name_size) != entry.name:
        raise Damaged("an entry that its zip directory calls by another name")
    if start + entry.stored > entry.end:
        raise Damaged("an entry reaches into the next one")
    stream.seek(start)
    data = stream.read(entry.stored)
    if entry.deflated:
        data = _inflated(data, entry.size)
    if len(data) != entry.size or zlib.crc32(data) != entry.checksum:
        raise Damaged("an entry does not match its checksum")
    return data


def _inflated(data: bytes, size: int) -> bytes:
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise Damaged("a damaged compressed entry") from error


def _directory(stream: BinaryIO) -> tuple[int, int, int]:
    """Number of entries, bytes and start of the directory."""
    whole = stream.seek(0, 2)
    begin = max(whole - _LONGEST_COMMENT - _END.size, 0)
    stream.seek(begin)
    tail = stream.read(_LONGEST_COMMENT + _END.size)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise Damaged("no end of a zip archive")
    _, count, size, start = _END.unpack_from(tail, at)
    end = begin + at
    if at >= _LOCATOR.size and tail[at - _LOCATOR.size :].startswith(b"PK\x06\x07"):
        _, end = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
        if end > whole:
            raise Damaged("no end of a zip archive")
        stream.seek(end)
        wide = stream.read(_END64.size)
        if len(wide) != _END64.size or wide[:4] != b"PK\x06\x06":
            raise Damaged("no end of a zip archive")
        _, count, size, start = _END64.unpack(wide)
    if start + size != end:
        raise Damaged("its zip directory is not where its end says")
    return count, size, start


def _wide(extra: bytes, length: int, packed: int, header: int) -> tuple[int, int, int]:
    """Sizes and offset of an entry; zip64 keeps large ones in an extra field."""
    if max(length, packed, header) < 0xFFFFFFFF:
        return length, packed, header
    at = 0
    while len(extra) - at >= 4:
        kind, size = struct.unpack_from("<2H", extra, at)
        field = extra[at + 4 : at + 4 + size]
        at += 4 + size
        if kind != 1:
            continue
        values = iter(struct.unpack_from(f"<{len(field) // 8}Q", field))
        length, packed, header = (
            next(values, 0) if value == 0xFFFFFFFF else value for value in (length, packed, header)
        )
        return length, packed, header
    raise Damaged("a zip entry of unknown size")


def _apart(found: list[Entry], end: int) -> dict[str, Entry]:
    """The entries with their ends, checked to not overlap."""
    placed: dict[str, Entry] = {}
    for entry in sorted(found, key=lambda entry: entry.header, reverse=True):
        name = entry.name.decode("utf-8", "replace")
        if entry.header + _LOCAL.size + entry.stored > end:
            raise Damaged("its zip entries overlap")
        if name in placed:
            raise Damaged("two zip entries of one name")
        placed[name] = replace(entry, end=end)
        end = entry.header
    return placed
