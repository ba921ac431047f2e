"""The size of a model's weight files: what is no candidate, and the headers."""

import json
from collections.abc import Collection
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..model.memory import block_bytes

#: Bytes of data that mlx-lm writes into one file.
SHARD = 5 << 30
#: Bytes of a file beside its data and the entries of its tensors, at most: the header's length, the
#: metadata, padding.
FILE = 64
#: Names of what a quantized tensor is stored as.
PARTS = ("weight", "scales", "biases")


@dataclass(frozen=True)
class FileSize:
    """What the weight files of a model take beside its candidates, in bytes.

    Attributes:
        fixed: Data of everything that is not a candidate.
        headers: All headers, at most.
        original: The files of the unquantized model in 16 bits.
    """

    fixed: int
    headers: int
    original: int

    @classmethod
    def of(cls, model: nn.Module, candidates: Collection[str]) -> "FileSize":
        """Count a model that ``mlx_lm.utils.save_model`` will write.

        Args:
            model: Nothing of it is evaluated.
            candidates: Paths of the tensors that may be quantized.
        """
        arrays = tree_flatten(model.parameters())
        assert isinstance(arrays, list)
        total = sum(array.nbytes for _, array in arrays)
        digits, weights = len(str(total)), {f"{path}.weight" for path in candidates}
        fixed = headers = half = plain = 0
        for name, array in arrays:
            one = _entry(name, array, digits)
            plain += one
            half += array.size * 2 if mx.issubdtype(array.dtype, mx.floating) else array.nbytes
            if name in weights:
                stem = name.removesuffix("weight")
                headers += sum(_entry(stem + part, array, digits) for part in PARTS)
            else:
                headers += one
                fixed += array.nbytes
        # Two files in a row hold more than one may; a model read layer by layer has small ones.
        shard = min(block_bytes(model) or SHARD, SHARD)
        beside = FILE * (2 + 2 * total // max(shard, 1))
        return cls(fixed, headers + beside, half + plain + beside)


#: Of a model whose files are not counted.
NOTHING = FileSize(0, 0, 0)


def _entry(name: str, array: mx.array, digits: int) -> int:
    """Bytes of a tensor's entry in a header, at most."""
    entry = {"dtype": "BF16", "shape": array.shape, "data_offsets": [10**digits - 1] * 2}
    return len(json.dumps({name: entry}, separators=(",", ":")))
