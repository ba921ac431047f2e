"""How far a finished model is from the original, with a bound that holds on other text like it."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import InputError
from ...planning.calibration import SAMPLED, on
from ...planning.divergence import Reference
from ...planning.generation import generated
from ...planning.parts import Parts
from ..precision import Precision, dequantized
from ..rounding.distillation import placed
from ..rounding.refinement import Refined, restored
from ..sensitivity.problem import Problem, batches

#: Share of texts on which a bound is to hold.
CONFIDENCE = 0.95
#: Fewest sequences that a bound is made of.
LEAST = 16
#: Sequences of the model's own text that are judged too, and the seed that no other text has.
BESIDE, SEED = 16, 1 << 20


@dataclass(frozen=True)
class Certificate:
    """What was measured on sequences that took no part in the conversion.

    Attributes:
        kl: KL(original || model), mean in nats per token.
        bound: Upper end of its one-sided 95 % confidence interval.
        same_top: Share of tokens whose most likely next token is the same.
        p99: 99th percentile of the tokens' KL, in nats.
        by_kind: Kind of text -> KL in nats per token. The first is the one above.
        sequences: Number of sequences.
        tokens: Number of tokens.
        text: SHA-256 of the tokens.
        model: Digest of the original's files, if they are known.
    """

    kl: float
    bound: float
    same_top: float
    p99: float
    by_kind: Mapping[str, float]
    sequences: int
    tokens: int
    text: str
    model: str | None = field(default=None)

    def entry(self) -> dict[str, Any]:
        """For ``optiq_metadata.json``."""
        return {
            "kl": self.kl,
            "kl_bound": self.bound,
            "confidence": CONFIDENCE,
            "same_top_token": self.same_top,
            "kl_99th_percentile": self.p99,
            "kl_by_kind": dict(self.by_kind),
            "sequences": self.sequences,
            "tokens": self.tokens,
            "text_sha256": self.text,
            "model": self.model,
        }

    def summary(self) -> str:
        """A line for the terminal."""
        source = next(iter(self.by_kind))
        return (
            f"[optiq] KL {self.kl:.4g} nats per token, with {CONFIDENCE:.0%} confidence at most "
            f"{self.bound:.4g}, on {self.tokens:,} tokens of held-out text {on(source)}; same top "
            f"token {self.same_top:.1%}, 99th percentile {self.p99:.3g}"
        )


def certified(
    problem: Problem,
    precisions: Mapping[str, Precision],
    refined: Refined,
    parameters: Mapping[str, mx.array],
    others: Mapping[str, np.ndarray],
) -> Certificate:
    """Measure a finished model on the held-out sequences.

    Args:
        problem: The planned problem; its model is left as it was.
        precisions: Precision of each tensor.
        refined: What is stored of the refined tensors; MLX's own rounding stands for the others.
        parameters: What is stored of unquantized parameters that moved, by parameter path.
        others: Kind of text -> further sequences, int32 (n, length), of which only the mean is
            kept.
    """
    held_out = problem.calibration.held_out
    check_sequences(held_out)
    every = {problem.calibration.source: held_out, **others}
    found = _compared(problem, precisions, refined, parameters, every)
    kl, same = found[problem.calibration.source]
    return Certificate(
        kl=float(kl.mean()),
        bound=upper_bound(kl.mean(axis=1)),
        same_top=float(same.mean()),
        p99=float(np.quantile(kl, 0.99)),
        by_kind={kind: float(part.mean()) for kind, (part, _) in found.items()},
        sequences=len(held_out),
        tokens=held_out.size,
        text=hashlib.sha256(held_out.tobytes()).hexdigest(),
        model=None if problem.key is None else problem.key.get("model"),
    )


def sampled_beside(problem: Problem, tokenizer: Any) -> dict[str, np.ndarray]:
    """Text of the model's own to judge beside a file's, by its name; none beside its own text."""
    data = problem.calibration
    if data.source == SAMPLED or problem.stream is not None:
        return {}
    length = data.held_out.shape[1]
    return {SAMPLED: generated(problem.model, tokenizer, BESIDE, length, seed=SEED)}


def check_sequences(held_out: np.ndarray) -> None:
    """Refuse a text of which too few sequences (n, length) are held out.

    Raises:
        InputError: There are fewer than `LEAST`.
    """
    if len(held_out) < LEAST:
        raise InputError(
            f"a bound on the KL needs {LEAST} held-out sequences of calibration text, and there "
            f"are {len(held_out)}: give more text with --optiq-calibration"
        )


def upper_bound(values: np.ndarray, confidence: float = CONFIDENCE) -> float:
    """Upper end of a one-sided confidence interval of the mean of skewed values (n,).

    Student's t, with Johnson's correction for skewness (Journal of the American Statistical
    Association 73, 1978): a mean of values with a long upper tail is more often too low.
    """
    count = len(values)
    spread = float(values.std(ddof=1))
    if spread == 0:
        return float(values.mean())
    t = student(confidence, count - 1)
    skew = float(np.mean((values - values.mean()) ** 3)) / spread**3
    return float(values.mean()) + spread / math.sqrt(count) * (
        t + skew / (6 * math.sqrt(count)) * (1 + 2 * t * t)
    )


def student(share: float, freedom: int) -> float:
    """The quantile of Student's t, by its expansion around the normal one.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5. Off by less than 0.2 % from
    7 degrees of freedom on, for shares up to 0.95.
    """
    z = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def _compared(
    problem: Problem,
    precisions: Mapping[str, Precision],
    refined: Refined,
    parameters: Mapping[str, mx.array],
    every: Mapping[str, np.ndarray],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kind of text -> KL of each token, and whether its top token is the same, (n, length) each."""
    parts, dtype = problem.parts, problem.dtype
    chosen = {path: p for path, p in precisions.items() if p.quantized}
    known = [
        (kind, tokens, Reference.run(parts, tokens))
        for kind, sequences in every.items()
        for tokens in batches(sequences)
    ]

    def weight(path: str) -> mx.array:
        if path in refined:
            return restored(refined[path], chosen[path], dtype)
        return dequantized(problem.weights[path], chosen[path], dtype)

    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {kind: [] for kind in every}
    moved = {path: value.astype(dtype) for path, value in parameters.items()}
    with placed(problem.model, moved), problem.replaced(chosen, weight):
        for kind, tokens, reference in known:
            found[kind].append(_rows(parts, tokens, reference))
    return {
        kind: (np.concatenate([kl for kl, _ in rows]), np.concatenate([same for _, same in rows]))
        for kind, rows in found.items()
    }


def _rows(parts: Parts, tokens: mx.array, reference: Reference) -> tuple[np.ndarray, np.ndarray]:
    """KL and agreement of each token of a batch, (batch, length) each."""
    kl, same, start = [], [], 0
    for logits in parts.logits(tokens):
        own = reference.part(start, len(logits))
        best = mx.take_along_axis(own.indices, own.log_probs.argmax(axis=-1, keepdims=True), -1)
        kl.append(own.divergence(logits))
        same.append(logits.argmax(axis=-1) == best[..., 0])
        mx.eval(kl[-1], same[-1])
        start += len(logits)
        del logits
    return (
        np.array(mx.concatenate(kl).reshape(tokens.shape)),
        np.array(mx.concatenate(same).reshape(tokens.shape)),
    )
