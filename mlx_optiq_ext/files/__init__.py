"""Writes complete files, and reads untrusted ones within limits.

Every downloaded file is untrusted. `read_json` and the other readers refuse a file that is not
regular, too large, nested too deep, ambiguous or not finite before it takes memory or time, and
name it::

    from mlx_optiq_ext import files

    entries = files.Fields.of(files.read_json(path), str(path))
    bits = entries.integer("bits", low=2, high=8)
"""

from .cache import ENVIRONMENT, cache_dir
from .documents import DEFAULT, LABELS, MODEL_CONFIG, REQUEST, Limits, parse_json, read_json
from .fields import Fields, shown
from .reading import open_regular, read_bytes, read_lines, read_text
from .records import append_records, left_out, not_kept, note_kept, read_records, records_kept
from .tensors import StoredTensor, TensorHeader, parse_header, read_header
from .unfinished import discard as discard_unfinished
from .writing import check_new, check_room, replaced, staged, write_json, write_text

__all__ = [
    "DEFAULT",
    "ENVIRONMENT",
    "LABELS",
    "MODEL_CONFIG",
    "REQUEST",
    "Fields",
    "Limits",
    "StoredTensor",
    "TensorHeader",
    "append_records",
    "cache_dir",
    "check_new",
    "check_room",
    "discard_unfinished",
    "left_out",
    "not_kept",
    "note_kept",
    "open_regular",
    "parse_header",
    "parse_json",
    "read_bytes",
    "read_header",
    "read_json",
    "read_lines",
    "read_records",
    "read_text",
    "records_kept",
    "replaced",
    "shown",
    "staged",
    "write_json",
    "write_text",
]
