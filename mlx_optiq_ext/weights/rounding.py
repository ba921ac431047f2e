"""Affine rounding of one weight against the second moment of its inputs.

Minimises ``tr((W - Q) H (W - Q)^T)`` over codes, scales and biases. Error feedback follows GPTQ
(Frantar et al., arXiv 2210.17323); the coordinate descent that polishes it follows QuantEase
(Behdin et al., arXiv 2309.01885), with each group's scale and bias refitted on the way.
"""

from dataclasses import dataclass

import mlx.core as mx

from .codes import pack
from .packing import Packing

#: Shares of a group's range that the search for its scale starts from.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
TINY = 1e-7

Packed = tuple[mx.array, mx.array, mx.array]


@dataclass
class _Groups:
    """A weight's state by group: codes (out, group), scales and biases (out, 1), in float32."""

    codes: list[mx.array]
    scales: list[mx.array]
    biases: list[mx.array]


def round_weight(
    weight: mx.array,
    moment: mx.array,
    packing: Packing,
    dtype: mx.Dtype,
    *,
    sweeps: int = 2,
    damping: float = 0.02,
) -> Packed:
    """Quantize a weight to MLX's affine layout.

    Args:
        weight: Target, (out, in).
        moment: Second moment of the inputs, (in, in), of any positive scale.
        packing: Bits and group size; the group size divides ``in``.
        dtype: In which scales and biases are stored; the search sees them rounded to it.
        sweeps: Coordinate-descent passes after the error feedback.
        damping: Share of the mean diagonal that is added to the diagonal.

    Returns:
        ``(packed, scales, biases)`` as ``mx.quantize`` returns them.
    """
    weight, moment = weight.astype(mx.float32), moment.astype(mx.float32)
    mean = mx.maximum(mx.mean(mx.diag(moment)), 1e-20)
    moment = moment / mean + damping * mx.eye(moment.shape[0])
    state = _feedback(weight, moment, packing, dtype)
    for _ in range(sweeps):
        _sweep(weight, moment, state, packing, dtype)
    return (
        pack(mx.concatenate(state.codes, axis=1), packing.bits),
        mx.concatenate(state.scales, axis=1).astype(dtype),
        mx.concatenate(state.biases, axis=1).astype(dtype),
    )


def _stored(values: mx.array, dtype: mx.Dtype) -> mx.array:
    return values.astype(dtype).astype(mx.float32)


def _nearest(weight: mx.array, scale: mx.array, bias: mx.array, bits: int) -> mx.array:
    return mx.clip(mx.round((weight - bias) / scale), 0, 2**bits - 1)


def fit_grid(
    weight: mx.array, importance: mx.array, bits: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Search each group's scale and bias for the least weighted squared error.

    Args:
        weight: One group per row, (out, group), float32.
        importance: Weight of each column's squared error, (group,).
        bits: Code width.
        dtype: In which scale and bias are stored.

    Returns:
        ``(scales, biases)``, float32 (out, 1), exact in ``dtype``.
    """
    top = 2**bits - 1
    share = importance[None] / mx.maximum(importance.sum(), TINY)
    low, high = weight.min(-1, keepdims=True), weight.max(-1, keepdims=True)

    def error(scale: mx.array, bias: mx.array) -> mx.array:
        left = _nearest(weight, scale, bias, bits) * scale + bias - weight
        return (share * mx.square(left)).sum(-1, keepdims=True)

    best: tuple[mx.array, mx.array, mx.array] | None = None
    # Fine grids gain nothing from a much narrower range.
    for width in RANGES if bits < 6 else RANGES[:3]:
        scale = _stored(mx.maximum((high - low) * (width / top), TINY), dtype)
        bias = _stored((low + high) / 2 - scale * (top / 2), dtype)
        for _ in range(3):
            found = error(scale, bias)
            if best is None:
                best = scale, bias, found
            else:
                better = found < best[2]
                best = (
                    mx.where(better, scale, best[0]),
                    mx.where(better, bias, best[1]),
                    mx.minimum(found, best[2]),
                )
            scale, bias = _least_squares(weight, share, scale, bias, bits, dtype)
    assert best is not None
    return best[0], best[1]


def _least_squares(
    weight: mx.array,
    share: mx.array,
    scale: mx.array,
    bias: mx.array,
    bits: int,
    dtype: mx.Dtype,
) -> tuple[mx.array, mx.array]:
    """The best scale and bias for the codes that the present ones give."""
    codes = _nearest(weight, scale, bias, bits)
    c, w = (share * codes).sum(-1, keepdims=True), (share * weight).sum(-1, keepdims=True)
    cc = (share * codes * codes).sum(-1, keepdims=True)
    cw = (share * codes * weight).sum(-1, keepdims=True)
    spread = cc - c * c
    fitted = (cw - c * w) / mx.where(spread > 1e-9, spread, 1.0)
    scale = mx.where((spread > 1e-9) & (mx.abs(fitted) > TINY), _stored(fitted, dtype), scale)
    return scale, _stored(w - scale * c, dtype)


def _inverse_factor(moment: mx.array) -> mx.array:
    """Upper Cholesky factor of the inverse, (in, in)."""
    with mx.stream(mx.cpu):  # MLX factorises on the CPU only
        inverse = mx.linalg.cholesky_inv(mx.linalg.cholesky(moment))
        return mx.linalg.cholesky(inverse, upper=True)


def _feedback(weight: mx.array, moment: mx.array, packing: Packing, dtype: mx.Dtype) -> _Groups:
    """Round column by column; each column's error moves to the columns not yet rounded."""
    factor, importance = _inverse_factor(moment), mx.diag(moment)
    size, bits = packing.group_size, packing.bits
    state = _Groups([], [], [])
    for start in range(0, weight.shape[1], size):
        end = start + size
        scale, bias = fit_grid(weight[:, start:end], importance[start:end], bits, dtype)
        s, b = scale[:, 0], bias[:, 0]
        block, local = weight[:, start:end].T, factor[start:end, start:end]
        rounded, errors = [], []
        for k in range(size):
            code = _nearest(block[k], s, b, bits)
            error = (block[k] - (code * s + b)) / local[k, k]
            # The factor is upper triangular: columns before k see a zero.
            block = block - local[k][:, None] * error[None]
            rounded.append(code)
            errors.append(error)
        state.codes.append(mx.stack(rounded, axis=1))
        state.scales.append(scale)
        state.biases.append(bias)
        if end < weight.shape[1]:
            moved = mx.stack(errors, axis=1) @ factor[start:end, end:]
            weight = mx.concatenate([weight[:, :end], weight[:, end:] - moved], axis=1)
        mx.eval(weight, state.codes[-1], scale, bias)
    return state


def _sweep(
    weight: mx.array, moment: mx.array, state: _Groups, packing: Packing, dtype: mx.Dtype
) -> None:
    """One pass over the groups: refit scale and bias, then re-round each column, both exactly."""
    size, top = packing.group_size, 2**packing.bits - 1
    parts = zip(state.codes, state.scales, state.biases, strict=True)
    left = weight - mx.concatenate([c * s + b for c, s, b in parts], axis=1)
    slope = left @ moment
    for g, start in enumerate(range(0, weight.shape[1], size)):
        end = start + size
        local, own = moment[start:end, start:end], slope[:, start:end]
        codes, old_scale, old_bias = state.codes[g], state.scales[g], state.biases[g]
        scale, bias = _refit(codes, old_scale, old_bias, own, local, dtype)
        change = (old_scale - scale) * codes + (old_bias - bias)
        block, s = (own + change @ local).T, scale[:, 0]
        again = []
        for k in range(size):
            before = codes[:, k]
            code = mx.clip(mx.round(before + block[k] / (local[k, k] * s)), 0, top)
            block = block + local[k][:, None] * ((before - code) * s)[None]
            again.append(code)
        state.codes[g], state.scales[g], state.biases[g] = mx.stack(again, axis=1), scale, bias
        slope = slope + (change + (codes - state.codes[g]) * scale) @ moment[start:end]
        mx.eval(slope, state.codes[g], scale, bias)


def _refit(
    codes: mx.array,
    scale: mx.array,
    bias: mx.array,
    slope: mx.array,
    local: mx.array,
    dtype: mx.Dtype,
) -> tuple[mx.array, mx.array]:
    """Least-squares scale and bias of one group with its codes and all other groups held."""
    weighted = codes @ local
    cc, co = (weighted * codes).sum(-1, keepdims=True), weighted.sum(-1, keepdims=True)
    oo = local.sum()
    rc, ro = (slope * codes).sum(-1, keepdims=True), slope.sum(-1, keepdims=True)
    spread = cc * oo - co * co
    solvable = spread > 1e-6 * cc * oo
    step = mx.where(solvable, (rc * oo - ro * co) / mx.where(solvable, spread, 1.0), 0.0)
    fitted = _stored(scale + step, dtype)
    fitted = mx.where(mx.abs(fitted) > TINY, fitted, scale)
    # The bias answers for the scale as stored, not as solved.
    shift = (ro - (fitted - scale) * co) / oo
    return fitted, mx.where(solvable, _stored(bias + shift, dtype), bias)
