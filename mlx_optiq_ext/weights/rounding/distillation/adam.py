"""Adam (Kingma and Ba, arXiv 1412.6980) with one second moment for a whole tensor.

A moment for every group would move those that matter least as far as the others. Codes have no mean
either: where a weight lies in its cell is the memory of what its gradients said.
"""

import mlx.core as mx

from .grids import State

#: Decay of the gradients' mean and of their mean square.
DECAY, SQUARE_DECAY = 0.9, 0.95
#: What has no mean.
PLAIN = ("codes",)


def moments(gradients: State) -> State:
    """The moments before the first update, for arrays of these names and shapes."""
    squares = {f"{name}.square": mx.array(0.0) for name in gradients}
    means = {f"{n}.mean": mx.zeros(g.shape) for n, g in gradients.items() if n not in PLAIN}
    return {**squares, **means}


def moves(gradients: State, moments: State, rates: State, corrections: list) -> tuple[State, State]:
    """What an update takes off each array, and the moments after it."""
    found, new = {}, {}
    for name, gradient in gradients.items():
        square = moments[f"{name}.square"]
        square = SQUARE_DECAY * square + (1 - SQUARE_DECAY) * mx.mean(mx.square(gradient))
        new[f"{name}.square"], direction = square, gradient
        if name not in PLAIN:
            mean = DECAY * moments[f"{name}.mean"] + (1 - DECAY) * gradient
            new[f"{name}.mean"], direction = mean, mean / corrections[0]
        found[name] = rates[name] * direction / (mx.sqrt(square / corrections[1]) + 1e-20)
    return found, new
