"""Gradients drawn at the logits and pulled through a model's head, a few tokens at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ...planning.parts import Parts
from .backward import gather
from .draws import Drawn, score
from .moments import Factors

#: How many chunks of logits the draws of a whole batch may take; beyond, each chunk has its own.
WHOLE = 4
#: Tokens that are differentiated at once on a GPU.
TOKENS = 4096


@dataclass(frozen=True)
class Head:
    """A head whose logits are too many to be drawn at for a whole batch.

    Attributes:
        parts: The model.
        draws: Number of gradients that are drawn at the logits of each batch.
    """

    parts: Parts
    draws: int

    @classmethod
    def of(cls, parts: Parts | None, batches: list[mx.array], draws: int) -> "Head | None":
        """The head of a model, or None if its logits are few or cannot be made in chunks."""
        largest = max((batch.size for batch in batches), default=0)
        if parts is None or parts.fits(-(-largest // WHOLE)):
            return None
        return cls(parts, draws)

    def together(self, length: int) -> int:
        """How many sequences of so many tokens to differentiate at once."""
        return 1 if mx.default_device() == mx.Device(mx.cpu) else max(1, TOKENS // length)

    def pulled(self, own: Drawn, hidden: mx.array, draw: int) -> mx.array:
        """Gradients at what the last layer returned, of the shape of ``hidden``."""
        found = []
        for rows, key in self._chunks(own, hidden, draw):

            def loss(rows: mx.array, key: mx.array = key) -> mx.array:
                logits = self.parts.head(rows)
                return (logits * mx.stop_gradient(score(logits, key))).sum()

            found.append(mx.grad(loss)(rows))
            mx.eval(found[-1])
        return mx.concatenate(found).reshape(hidden.shape)

    def gather(
        self,
        modules: Mapping[str, nn.Module],
        own: Drawn,
        hidden: mx.array,
        draw: int,
        found: dict[str, Factors],
    ) -> None:
        """Add the head's part to the factors of the modules around the layers."""
        for rows, key in self._chunks(own, hidden, draw):
            cotangent = score(self.parts.head(rows), key)
            gather(modules, lambda r: [self.parts.head(r)], [rows], [cotangent], found, ())

    def _chunks(
        self, own: Drawn, hidden: mx.array, draw: int
    ) -> Iterator[tuple[mx.array, mx.array]]:
        """Rows (tokens, dim) of what the last layer returned, and the key to draw with."""
        keys = mx.random.split(mx.random.key(own.batch * self.draws + draw), own.rows)
        step = self.parts.tokens
        for sequence, key in zip(hidden, keys[own.row :], strict=False):
            starts = range(0, len(sequence), step)
            for start, one in zip(starts, mx.random.split(key, len(starts)), strict=True):
                yield sequence[start : start + step], one
