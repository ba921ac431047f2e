"""Files on disk: whole ones written, and untrusted ones read within limits.

Whatever a user downloads is untrusted. `read_json` and its kin refuse what is no regular file, too
large, too deep, ambiguous or not finite, before it costs memory or time, and name the file::

    from mlx_optiq_ext import files

    entries = files.Fields.of(files.read_json(path), str(path))
    bits = entries.integer("bits", low=2, high=8)
"""

from .cache import cache_dir
from .documents import DEFAULT, LABELS, MODEL_CONFIG, REQUEST, Limits, parse_json, read_json
from .fields import Fields, shown
from .reading import open_regular, read_bytes, read_lines, read_text
from .tensors import StoredTensor, TensorHeader, parse_header, read_header
from .writing import staged, write_json, write_text

__all__ = [
    "DEFAULT",
    "LABELS",
    "MODEL_CONFIG",
    "REQUEST",
    "Fields",
    "Limits",
    "StoredTensor",
    "TensorHeader",
    "cache_dir",
    "open_regular",
    "parse_header",
    "parse_json",
    "read_bytes",
    "read_header",
    "read_json",
    "read_lines",
    "read_text",
    "shown",
    "staged",
    "write_json",
    "write_text",
]
