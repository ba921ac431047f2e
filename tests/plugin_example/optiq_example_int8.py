"""A KV format of one file: 8-bit integers with one scale a vector."""

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from mlx_optiq_ext.errors import InputError, UnsupportedError
from mlx_optiq_ext.kv.formats import Format


@dataclass(frozen=True)
class Int8(Format):
    """``--optiq-kv 8s``, or ``{"layer_idx": 0, "bits": 8, "method": "int8"}`` in a file."""

    name = "int8"
    letters: ClassVar = {"s": {}}
    parts = ("codes", "scales")

    bits: int = 8

    @classmethod
    def from_json(cls, fields, where):
        if fields.get("bits") != 8:
            raise InputError(f"{where}: int8 has 8 bits, not {fields.get('bits')!r}")
        return cls()

    def to_json(self):
        return {"bits": self.bits}

    def fitted(self, dim):
        if dim % 4:
            raise UnsupportedError(f"int8 packs heads of a multiple of 4, not {dim}")
        return self

    @property
    def bits_per_element(self):
        return 8 + 16 / 128

    def pack(self, array):
        scales = mx.maximum(mx.abs(array).max(axis=-1, keepdims=True), 1e-6) / 127
        return mx.round(array / scales).astype(mx.int8).view(mx.uint32), scales

    def unpack(self, parts, dtype):
        codes, scales = parts
        return codes.view(mx.int8).astype(dtype) * scales.astype(dtype)

    def __str__(self):
        return "8s"
