"""The steps of rounding in numpy: one group of columns at a time, all of its rows at once.

A column depends on the one before, and as an array graph each step would cost more to dispatch than
to compute.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from . import threads
from .grid import TINY, Format, Rounded
from .metric import Ordered

#: Columns whose effect on later ones is put off and then added in one product.
LAZY = 16
#: Rows that are worked on at once: what they take stays in a core's cache.
ROWS = 2048


class Host:
    """The steps in numpy; see `steps.Steps`."""

    beside = False

    def array(self, values: Any) -> np.ndarray:
        """Values in float32."""
        if isinstance(values, mx.array):
            values = np.array(values.astype(mx.float32))
        return np.asarray(values, np.float32)

    def product(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """``left @ right``."""
        if left.ndim < 3 or left.shape[1] <= ROWS:
            return left @ right
        places = _places(left.shape)
        others = np.broadcast_to(right, (len(left), *right.shape[-2:]))
        return _whole_array(places, threads.each(lambda at: left[at] @ others[at[0]], places))

    def concatenate(self, parts: Sequence[np.ndarray], axis: int = -1) -> np.ndarray:
        """Parts side by side."""
        return np.concatenate(parts, axis=axis)

    def take(self, values: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
        """Elements along an axis; ``at`` is (count,), or (batch, count) for the last axis."""
        if at.ndim == 1:
            return np.take(values, at, axis=axis)
        return np.take_along_axis(values, at[:, None], axis=-1)

    def choose(self, condition: Any, new: np.ndarray, old: np.ndarray) -> np.ndarray:
        """One array where a condition holds, else another."""
        return np.where(condition, new, old)

    def start(self, *arrays: np.ndarray) -> None:
        """Begin to compute; numpy has done it already."""

    def feedback(self, target: np.ndarray, found: Ordered, form: Format) -> Rounded:
        """Round rows column by column; see `steps.Steps`."""
        places = _places(target.shape)
        return _together(
            places, threads.each(lambda at: _fed_back(target[at], found, at[0], form), places)
        )

    def sweep(
        self, done: Rounded, slope: np.ndarray, found: Ordered, form: Format
    ) -> tuple[Rounded, np.ndarray]:
        """One pass of coordinate descent; see `steps.Steps`."""

        def swept(at: Place) -> tuple[Rounded, np.ndarray]:
            own = Rounded(*(part[at] for part in done))
            return _swept_rows(own, slope[at], found.moment[at[0]], form)

        places = _places(slope.shape)
        rows, changes = zip(*threads.each(swept, places), strict=True)
        return _together(places, rows), _whole_array(places, changes)


#: Number of a weight in a batch, and some of its rows.
Place = tuple[int, slice]


def _places(shape: tuple[int, ...]) -> list[Place]:
    """The rows of each weight (batch, rows, in), a few at a time."""
    return [
        (n, slice(start, min(start + ROWS, shape[1])))
        for n in range(shape[0])
        for start in range(0, shape[1], ROWS)
    ]


def _together(places: Sequence[Place], parts: Sequence[Rounded]) -> Rounded:
    return Rounded(*(_whole_array(places, same) for same in zip(*parts, strict=True)))


def _whole_array(places: Sequence[Place], parts: Sequence[np.ndarray]) -> np.ndarray:
    batch, rows = (places[-1][0] + 1, places[-1][1].stop)
    return np.concatenate(parts).reshape(batch, rows, *parts[0].shape[1:])


def _joined(parts: list[tuple[np.ndarray, ...]]) -> Rounded:
    return Rounded(*(np.concatenate(same, axis=1) for same in zip(*parts, strict=True)))


def _fed_back(target: np.ndarray, found: Ordered, number: int, form: Format) -> Rounded:
    """One weight's rows."""
    parts: list[tuple[np.ndarray, ...]] = []
    coupling, shift = found.coupling[number], np.zeros_like(target)
    for group, at in enumerate(found.slices):
        own = target[:, at]
        moved = own + shift[:, at] @ found.unmixed[number, group]
        inside = found.inside[number, group]
        parts.append(_rounded(own, moved, found.shares[number, at], inside, form))
        shift[:, at.stop :] += parts[-1][-1] @ coupling[at, at.stop :]
    return _joined(parts)


def _swept_rows(
    done: Rounded, slope: np.ndarray, moment: np.ndarray, form: Format
) -> tuple[Rounded, np.ndarray]:
    """One weight's rows, and the change of their error."""
    parts: list[tuple[np.ndarray, ...]] = []
    slope, size = slope.copy(), form.group_size
    for group in range(done.scales.shape[1]):
        at, one = slice(group * size, (group + 1) * size), slice(group, group + 1)
        stored = done.codes[:, at], done.scales[:, one], done.biases[:, one]
        parts.append(_swept(slope[:, at], *stored, moment[at, at], form))
        slope[:, at.stop :] += parts[-1][-1] @ moment[at, at.stop :]
    found = _joined(parts)
    return found._replace(error=done.error + found.error), found.error


def _rounded(
    weight: np.ndarray, target: np.ndarray, share: np.ndarray, coupling: np.ndarray, form: Format
) -> tuple[np.ndarray, ...]:
    """Codes, scales, biases and the error of one weight's group."""
    scale, bias = fit(target, share, form)
    s, b = np.ascontiguousarray(scale[:, 0]), np.ascontiguousarray(bias[:, 0])
    block = np.array(target.T, order="C")
    taken = np.empty_like(block)
    for k in _turns(block, coupling):
        row, code = block[k], taken[k]
        np.subtract(row, b, out=code)
        code /= s
        _whole(code, form.top)
        row -= code * s + b
    codes = taken.T
    return codes.astype(np.uint8), scale, bias, weight - (codes * scale + bias)


def _swept(
    slope: np.ndarray,
    codes: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    moment: np.ndarray,
    form: Format,
) -> tuple[np.ndarray, ...]:
    """Codes, scales and biases anew, and the change of the error."""
    codes, local = codes.astype(np.float32), np.ascontiguousarray(moment)
    new_scale, new_bias = _refit(codes, scale, bias, slope, local, form)
    moved = (scale - new_scale) * codes + (bias - new_bias)
    block = np.array((slope + moved @ local).T, order="C")
    before, again = np.ascontiguousarray(codes.T), np.empty_like(block)
    s = np.ascontiguousarray(new_scale[:, 0])
    for k in _turns(block, local):
        row, code = block[k], again[k]
        np.divide(row, s * local[k, k], out=code)
        code += before[k]
        _whole(code, form.top)
        np.subtract(before[k], code, out=row)
        row *= s
    changed = moved + (before - again).T * new_scale
    return again.T.astype(np.uint8), new_scale, new_bias, changed


def _divided(above: np.ndarray, below: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above), where=where)


def fit(weight: np.ndarray, share: np.ndarray, form: Format) -> tuple[np.ndarray, np.ndarray]:
    """Search each row's scale and bias for the least weighted squared error.

    Args:
        weight: One group, (rows, group).
        share: Weight of each column's squared error, (group,), of sum 1.
        form: Bits and storage dtype.

    Returns:
        ``(scales, biases)``, (rows, 1), exact in the storage dtype.
    """
    low, high = weight.min(-1, keepdims=True), weight.max(-1, keepdims=True)
    mean = (weight @ share)[:, None]
    best: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    for width in form.ranges:
        scale = form.stored(np.maximum((high - low) * (width / form.top), TINY))
        bias = form.stored((low + high) / 2 - scale * (form.top / 2))
        for _ in range(3):
            codes = np.clip(np.rint((weight - bias) / scale), 0, form.top)
            error = (np.square(codes * scale + bias - weight) @ share)[:, None]
            if best is None:
                best = scale, bias, error
            else:
                better = error < best[2]
                best = (
                    np.where(better, scale, best[0]),
                    np.where(better, bias, best[1]),
                    np.minimum(error, best[2]),
                )
            # The least-squares line through the codes at hand.
            weighted = codes * share
            c, cc = weighted.sum(-1, keepdims=True), (weighted * codes).sum(-1, keepdims=True)
            cw, spread = (weighted * weight).sum(-1, keepdims=True), cc - c * c
            fitted = form.stored(_divided(cw - c * mean, spread, spread > 1e-9))
            scale = np.where(np.abs(fitted) > TINY, fitted, scale)
            bias = form.stored(mean - scale * c)
    assert best is not None
    return best[0], best[1]


def _whole(values: np.ndarray, top: float) -> None:
    """Round to codes in place; numpy's clip takes longer than both of its halves."""
    np.rint(values, out=values)
    np.maximum(values, 0, out=values)
    np.minimum(values, top, out=values)


def _turns(block: np.ndarray, coupling: np.ndarray) -> Iterator[int]:
    """The lines of a block in turn; what the caller leaves in a line moves those that follow.

    Args:
        block: One line a column, (group, rows).
        coupling: How much of line ``k`` is added to line ``j > k``, (group, group).
    """
    # Among a few lines at once, to all further ones in one product: GPTQ's lazy batches.
    for first in range(0, len(block), LAZY):
        last = min(first + LAZY, len(block))
        for k in range(first, last):
            yield k
            if k + 1 < last:
                block[k + 1 : last] += coupling[k, k + 1 : last, None] * block[k]
        if last < len(block):
            block[last:] += coupling[first:last, last:].T @ block[first:last]


def _refit(
    codes: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    slope: np.ndarray,
    local: np.ndarray,
    form: Format,
) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares scale and bias of one group, with its codes and all other groups held."""
    weighted, oo = codes @ local, local.sum()
    cc, co = (weighted * codes).sum(-1, keepdims=True), weighted.sum(-1, keepdims=True)
    rc, ro = (slope * codes).sum(-1, keepdims=True), slope.sum(-1, keepdims=True)
    spread = cc * oo - co * co
    solvable = spread > 1e-6 * cc * oo
    fitted = form.stored(scale + _divided(rc * oo - ro * co, spread, solvable))
    fitted = np.where(np.abs(fitted) > TINY, fitted, scale)
    # The bias answers for the scale as stored, not as solved.
    shifted = form.stored(bias + (ro - (fitted - scale) * co) / oo)
    return fitted, np.where(solvable, shifted, bias)
