"""Writes ``.npz`` files whose integer codes are stored near their entropy.

A ``.npz`` file is a zip archive of ``.npy`` entries, and ``mx.load`` unpacks deflated ones. The
codes of a quantized weight are random, so matching strings, as zip programs do, saves nothing. Each
entry is compressed with Huffman coding alone if that is smaller.
Format: PKWARE's APPNOTE for zip, RFC 1951 for deflate, NumPy's NEP 1 for ``.npy``.
"""

import io
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

#: Bytes of an archive without entries.
END_BYTES = 22

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_DATE = 0x21  # a fixed date, so that equal weights make equal files


def _deflate(data: bytes, strategy: int) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    return stream.compress(data) + stream.flush()


def _packed(array: np.ndarray) -> tuple[bytes, bytes]:
    """An array as ``.npy`` bytes, and these deflated."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array, order="C"), version=(1, 0))
    plain = stream.getvalue()
    coded = _deflate(plain, zlib.Z_HUFFMAN_ONLY)
    # Small and constant arrays have repeated strings; codes do not.
    if len(plain) < 4096 or not array.any():
        coded = min(coded, _deflate(plain, zlib.Z_DEFAULT_STRATEGY), key=len)
    return plain, coded


def entry_bytes(name: str, array: np.ndarray) -> int:
    """Bytes that an array takes in the file, its name and headers included."""
    return _LOCAL.size + _CENTRAL.size + 2 * len(f"{name}.npy") + len(_packed(array)[1])


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> int:
    """Write an ``.npz`` file and return its size in bytes.

    Raises:
        OSError: The file cannot be written.
    """
    directory = []
    with path.open("wb") as file:
        for name, array in arrays.items():
            plain, coded = _packed(array)
            entry, offset = f"{name}.npy".encode("ascii"), file.tell()
            common = (20, 0, 8, 0, _DATE, zlib.crc32(plain), len(coded), len(plain), len(entry), 0)
            file.write(_LOCAL.pack(b"PK\x03\x04", *common) + entry + coded)
            made = (20, *common, 0, 0, 0, 0, offset)
            directory.append(_CENTRAL.pack(b"PK\x01\x02", *made) + entry)
        start, listing = file.tell(), b"".join(directory)
        count = len(directory)
        ends = _END.pack(b"PK\x05\x06", 0, 0, count, count, len(listing), start, 0)
        file.write(listing + ends)
        return file.tell()
