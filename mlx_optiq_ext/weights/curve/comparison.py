"""KL divergence and perplexity of whole plans, beside the unquantized model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ... import distributed
from ...planning.divergence import Reference
from ..judgement import Precisions
from ..sensitivity.problem import Problem, batches


@dataclass(frozen=True)
class Comparison:
    """A plan whose tensors are rounded as MLX rounds them.

    Attributes:
        kl: Mean KL(reference || plan) on the held-out sequences, in nats per token.
        perplexity_ratio: Its perplexity on them over that of the unquantized model.
    """

    kl: float
    perplexity_ratio: float


def compare(problem: Problem, plans: Sequence[Precisions]) -> list[Comparison]:
    """Judge whole plans on the held-out sequences.

    The processes of ``mlx.launch`` judge some plans each, and all get every result.
    """
    own = distributed.share(range(len(plans)))
    rows: dict[int, list[np.ndarray]] = {index: [] for index in own}
    for tokens in batches(problem.calibration.held_out) if own else ():
        references, before = _unquantized(problem, tokens)
        for index in own:
            with problem.quantized(plans[index]):
                rows[index].append(_judged(problem, tokens, references, before))
    found = {
        index: row
        for part in distributed.gathered({i: np.concatenate(each) for i, each in rows.items()})
        for index, row in part.items()
    }
    return [_comparison(found[index]) for index in range(len(plans))]


def _comparison(rows: np.ndarray) -> Comparison:
    """From (tokens, 2): the divergence of each token, and how much less likely what follows is."""
    kl, worse = rows.T.astype(np.float64)
    lost = float(np.nanmean(worse))
    ratio = math.exp(lost) if lost < 700 else math.inf
    return Comparison(float(kl.mean()) if np.isfinite(kl).all() else math.inf, ratio)


def _unquantized(problem: Problem, tokens: mx.array) -> tuple[list[Reference], list[mx.array]]:
    """The reference and the log-probabilities of what follows, a chunk of tokens at a time."""
    following, references, before, start = _following(tokens), [], [], 0
    for logits in problem.parts.logits(tokens):
        at = slice(start, start + len(logits))
        references.append(Reference.of(logits))
        before.append(_log_probs(logits, following[at]))
        mx.eval(before[-1])
        start = at.stop
        del logits
    return references, before


def _judged(
    problem: Problem, tokens: mx.array, references: list[Reference], before: list[mx.array]
) -> np.ndarray:
    following, found, start = _following(tokens), [], 0
    for number, logits in enumerate(problem.parts.logits(tokens)):
        at = slice(start, start + len(logits))
        worse = before[number] - _log_probs(logits, following[at])
        found.append(mx.stack([references[number].divergence(logits), worse], axis=-1))
        mx.eval(found[-1])
        start = at.stop
        del logits
    rows = np.array(mx.concatenate(found))
    rows[tokens.shape[1] - 1 :: tokens.shape[1], 1] = np.nan  # nothing follows a last token
    return rows


def _following(tokens: mx.array) -> mx.array:
    """The token after each (batch * length,); after the last of a sequence any."""
    return mx.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1).reshape(-1)


def _log_probs(logits: mx.array, following: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, following[:, None], axis=-1)[:, 0]
    return chosen - mx.logsumexp(logits, axis=-1)
