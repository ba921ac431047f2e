"""Formats of a KV cache: how they quantize, how plans name them, and which kernels read them.

A format of your own takes one file::

    @kv.formats.register
    @dataclass(frozen=True)
    class Int8(kv.formats.Format):
        name, letters, parts = "int8", {"s": {}}, ("codes", "scales")
        bits: int
        ...

After that ``--optiq-kv 8s`` and ``"method": "int8"`` in kv_config.json name it. A plugin offers it
to the stock commands with the hook ``optiq_kv_formats``.
"""

from .affine import Affine
from .format import CodeLayout, Format, Interleaving, Multiplying
from .key_transform import KeyTransform
from .registry import from_json, from_spec, register, registered, to_json, unregister
from .turboquant import TurboQuant

register(Affine)
register(TurboQuant)

__all__ = [
    "Affine",
    "CodeLayout",
    "Format",
    "Interleaving",
    "KeyTransform",
    "Multiplying",
    "TurboQuant",
    "from_json",
    "from_spec",
    "register",
    "registered",
    "to_json",
    "unregister",
]
