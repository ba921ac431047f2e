"""Adam (Kingma and Ba, arXiv 1412.6980) with second moments that many values share.

Scales, biases and norms share one for a whole tensor: a moment for every group would move those
that matter least as far as the others. Codes share one for each row and one for each column, as in
Adafactor (Shazeer and Stern, arXiv 1804.04235): a column of large activations would else be all
that moves. Codes have no mean: where a weight lies in its cell is the memory of what its gradients
said.
"""

import mlx.core as mx

from .grids import State

#: Decay of the gradients' mean and of their mean square.
DECAY, SQUARE_DECAY = 0.9, 0.95
#: What has moments of rows and columns, and no mean.
FACTORED = ("codes",)
TINY = 1e-30


def moments(gradients: State) -> State:
    """The moments before the first update, for arrays of these names and shapes."""
    found = {}
    for name, gradient in gradients.items():
        if name in FACTORED:
            *others, rows, columns = gradient.shape
            found[f"{name}.rows"] = mx.zeros((*others, rows, 1))
            found[f"{name}.columns"] = mx.zeros((*others, 1, columns))
        else:
            found[f"{name}.mean"] = mx.zeros(gradient.shape)
            found[f"{name}.square"] = mx.array(0.0)
    return found


def moves(gradients: State, moments: State, rates: State, corrections: list) -> tuple[State, State]:
    """What an update takes off each array, and the moments after it.

    Args:
        gradients: Name -> gradient.
        moments: From `moments`, or the update before.
        rates: Name -> rate, a scalar.
        corrections: Of the mean and of the square for their start at 0, scalars.
    """
    found, new = {}, {}
    for name, gradient in gradients.items():
        square = mx.square(gradient)
        if name in FACTORED:
            rows = _mixed(moments[f"{name}.rows"], square.mean(axis=-1, keepdims=True))
            columns = _mixed(moments[f"{name}.columns"], square.mean(axis=-2, keepdims=True))
            new[f"{name}.rows"], new[f"{name}.columns"] = rows, columns
            # Apart, for their product may be too small for float32.
            row = mx.rsqrt(rows / (rows.mean(axis=-2, keepdims=True) + TINY) + TINY)
            direction = gradient * row * mx.rsqrt(columns / corrections[1] + TINY)
        else:
            mean = DECAY * moments[f"{name}.mean"] + (1 - DECAY) * gradient
            new[f"{name}.mean"] = mean
            new[f"{name}.square"] = kept = _mixed(moments[f"{name}.square"], square.mean())
            direction = mean / corrections[0] * mx.rsqrt(kept / corrections[1] + TINY)
        found[name] = rates[name] * direction
    return found, new


def _mixed(moment: mx.array, new: mx.array) -> mx.array:
    return SQUARE_DECAY * moment + (1 - SQUARE_DECAY) * new
