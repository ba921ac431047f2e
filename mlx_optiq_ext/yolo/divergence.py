"""Detection error between two networks."""

from dataclasses import dataclass

import mlx.core as mx

from .network import Outputs

#: Probabilities are kept this far from 0 and 1.
EDGE = 1e-7


@dataclass(frozen=True)
class Divergence:
    """Detection error of one network against another, summed over an image's anchors.

    Attributes:
        classes: KL divergence of the class probabilities, each a Bernoulli variable, in nats.
        boxes: 1 - IoU of the boxes, weighted by the reference's confidence.
        extra: Squared error of mask coefficients, prototypes or key points over their squared
            size, weighted by the confidence too; 0 for detection.
    """

    classes: float
    boxes: float
    extra: float

    @property
    def total(self) -> float:
        """The detection error."""
        return self.classes + self.boxes + self.extra


def divergence(reference: Outputs, other: Outputs) -> Divergence:
    """Compare outputs anchor by anchor; on the one-to-one head an anchor is a match."""
    p = mx.clip(reference.scores, EDGE, 1 - EDGE)
    q = mx.clip(other.scores, EDGE, 1 - EDGE)
    classes = p * (mx.log(p) - mx.log(q)) + (1 - p) * (mx.log1p(-p) - mx.log1p(-q))
    weight = confidence(reference)
    boxes = weight * (1 - overlap(reference.boxes, other.boxes))
    extra = mx.array(0.0)
    if reference.extra.shape[-1]:
        error = mx.square(other.extra - reference.extra).mean(-1)
        extra = extra + (weight * error / mx.square(scale(reference.extra)).mean(-1)).sum()
    if reference.masks is not None and other.masks is not None:
        error = mx.square(other.masks - reference.masks).mean()
        extra = extra + error / mx.square(reference.masks).mean()
    sums = [part.sum().item() for part in (classes, boxes, extra)]
    return Divergence(*sums)  # pyright: ignore[reportArgumentType]


def mean(values: list[Divergence]) -> Divergence:
    """The mean over images."""
    count = len(values)
    return Divergence(
        sum(v.classes for v in values) / count,
        sum(v.boxes for v in values) / count,
        sum(v.extra for v in values) / count,
    )


def confidence(outputs: Outputs) -> mx.array:
    """(anchors,) the probability of the likeliest class."""
    return outputs.scores.max(-1)


def scale(extra: mx.array) -> mx.array:
    """(1, m) root mean square of each extra column, away from zero."""
    return mx.sqrt(mx.square(extra).mean(0, keepdims=True)) + 1e-6


def overlap(a: mx.array, b: mx.array) -> mx.array:
    """IoU of boxes (n, 4), centre x, centre y, width, height, row by row."""
    low = mx.maximum(a[:, :2] - a[:, 2:] / 2, b[:, :2] - b[:, 2:] / 2)
    high = mx.minimum(a[:, :2] + a[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2)
    shared = mx.maximum(high - low, 0).prod(-1)
    areas = mx.maximum(a[:, 2:], 0).prod(-1) + mx.maximum(b[:, 2:], 0).prod(-1)
    union = areas - shared
    return mx.where(union > 0, shared / mx.maximum(union, 1e-9), 1.0)  # two empty boxes agree
