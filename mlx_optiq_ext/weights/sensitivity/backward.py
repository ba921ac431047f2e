"""The backward pass through a part of a model, and detection of gradients that MLX lacks."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from ...model.taps import Use, tapped
from .moments import Factors

#: MLX's message for a primitive without a gradient.
LACKING = re.compile(r"vjp|gradient|function transformation", re.IGNORECASE)


class GradientError(Exception):
    """MLX cannot differentiate a model; the message is MLX's own first line."""


@contextmanager
def told_apart() -> Iterator[None]:
    """Raises GradientError where MLX has no gradient for an operation or a kernel.

    Other errors, such as running out of memory, pass through.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        if not LACKING.search(reason):
            raise
        raise GradientError(reason) from error


def gather(
    modules: Mapping[str, nn.Module],
    run: Callable[..., list[mx.array]],
    inputs: list[mx.array],
    cotangents: list[mx.array],
    found: dict[str, Factors],
    across: Collection[str],
) -> list[mx.array]:
    """Differentiate a part of a model, add to its layers' sums, and return its inputs' gradients.

    Args:
        modules: Layer path -> quantizable layer of this part.
        run: Computes the part.
        inputs: Arguments of ``run``.
        cotangents: Gradients at the results of ``run``.
        found: Factors to add to.
        across: Paths whose whole output moment is wanted.
    """
    uses: list[Use] = []

    def see(use: Use) -> mx.array:
        uses.append(use)
        return use.outputs

    with tapped(modules, see):
        run(*inputs)  # only traced for the shapes, not evaluated
    if not uses and not inputs:
        return []

    def probed(*primals: mx.array) -> list[mx.array]:
        again: list[Use] = []
        given, offsets = primals[: len(inputs)], primals[len(inputs) :]

        def shift(use: Use) -> mx.array:
            again.append(use)
            return use.outputs + offsets[len(again) - 1]

        with tapped(modules, shift):
            results = run(*given)
        return [*results, *(use.inputs for use in again if not use.lookup)]

    offsets = [mx.zeros(use.outputs.shape, use.outputs.dtype) for use in uses]
    seen = [use.inputs for use in uses if not use.lookup]
    zeros = [mx.zeros(i.shape, i.dtype) for i in seen]
    values, gradients = mx.vjp(probed, [*inputs, *offsets], [*cotangents, *zeros])
    products, pulled = iter(values[len(cotangents) :]), gradients[len(inputs) :]
    sums = [mx.abs(gradient.astype(mx.float32)).sum() for gradient in pulled]
    mx.eval(sums, gradients[: len(inputs)])
    for use, gradient, total in zip(uses, pulled, sums, strict=True):
        met = use if use.lookup else Use(use.path, next(products), use.indices, gradient)
        # A layer that also runs elsewhere, out of this stretch's reach, shows no gradient here;
        # where gradients overflow, the tensor is better measured directly.
        if 0 < float(total) < math.inf:
            shape = tuple(modules[use.path]["weight"].shape)
            found[use.path].add(met, gradient, shape, across=use.path in across)
    mx.eval([found[use.path].arrays() for use in uses])
    return gradients[: len(inputs)]
