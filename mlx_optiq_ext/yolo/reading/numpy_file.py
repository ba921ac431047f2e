"""``.npz`` files, checked before MLX reads them.

Such a file is a zip archive of ``.npy`` entries, which may be deflated: a few kilobytes can inflate
to gigabytes, and a header can declare more than the data that follows. Format: NumPy's NEP 1.
"""

import math
import re
from typing import BinaryIO

from . import zip_archive
from .torch_objects import Damaged

#: Limits of all entries' inflated size: in bytes, and as a multiple of the file's size.
BYTES, TIMES = 64 << 20, 16

_HEADER = re.compile(
    rb"\{'descr': '[<|][?bBiufcV](\d{1,2})', 'fortran_order': (?:False|True), "
    rb"'shape': \(([0-9, ]{0,200})\),? ?\} *\n"
)


def check(stream: BinaryIO) -> None:
    """Check that a file is complete and its inflated size is within limits.

    Raises:
        Damaged: The check fails.
    """
    entries = zip_archive.entries(stream)
    if sum(entry.size for entry in entries.values()) > BYTES + TIMES * stream.seek(0, 2):
        raise Damaged("its entries come to far more than the file")
    for name, entry in entries.items():
        _check_array(zip_archive.content(stream, entry), name)


def _check_array(data: bytes, name: str) -> None:
    wide = data[6:7] != b"\1"
    length = int.from_bytes(data[8 : 12 if wide else 10], "little")
    start = (12 if wide else 10) + length
    found = _HEADER.fullmatch(data[start - length : start])
    if not data.startswith(b"\x93NUMPY") or length > 10_000 or found is None:
        raise Damaged(f"{name:.80} is no array of NumPy")
    size = math.prod(int(n) for n in re.findall(rb"\d+", found[2]))
    if len(data) - start != size * int(found[1]):
        raise Damaged(f"{name:.80} has another size than it says")
