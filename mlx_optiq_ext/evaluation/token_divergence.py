"""KL(reference || model) over a text, one model in memory at a time.

For each sequence only the reference's 1024 most likely tokens and the sum over the rest are kept,
until the model has been compared with them. The figures follow llama.cpp's
``--kl-divergence`` (llama.cpp #5076), with errors over sequences.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ..errors import InputError
from ..kv import make_caches
from ..model.vocabulary import check_tokens
from ..planning.divergence import TOP, Reference
from .journal import Journal
from .models import Subject
from .statistics import clustered_error

#: Positions whose logits are in memory at once.
CHUNK = 512
QUANTILES = (50, 90, 95, 99, 99.9)
#: Below these values figures are float32 rounding: nats, and a share of probability in %.
NOISE = {
    **dict.fromkeys(("mean", "error", "median", "p90", "p95", "p99", "p99.9", "max"), 1e-6),
    **dict.fromkeys(("probability_change", "rms_probability_change"), 1e-4),
    "perplexity_ratio_error": 1e-6,
}


def logits_of(model: Any, tokens: np.ndarray, chunk: int = CHUNK) -> Iterator[tuple[int, mx.array]]:
    """Logits (1, n, vocabulary) of a sequence chunk by chunk through the cache, with positions."""
    check_tokens(model, tokens)
    cache = make_caches(model)
    for start in range(0, len(tokens), chunk):
        piece = model(mx.array(tokens[None, start : start + chunk]), cache=cache)
        mx.eval(piece)
        yield start, piece


def target_log_probs(logits: mx.array, targets: np.ndarray) -> mx.array:
    """Log-probabilities of the tokens that follow, float32 (n,)."""
    logits = logits[0, : len(targets)].astype(mx.float32)
    chosen = mx.take_along_axis(logits, mx.array(targets)[:, None], axis=-1)[:, 0]
    return chosen - mx.logsumexp(logits, axis=-1)


def compare(
    model: Subject,
    reference: Subject,
    tokens: np.ndarray,
    *,
    top: int = TOP,
    chunk: int = CHUNK,
    progress: bool = True,
) -> dict[str, float]:
    """How far a model's distributions are from a reference's.

    Args:
        model: The model to judge.
        reference: The model to compare with.
        tokens: int32 (sequences, context), valid for both models.
        top: Most likely tokens of the reference to keep at each position.
        chunk: Positions whose logits are in memory at once.
        progress: Whether to show progress bars.

    Returns:
        ``mean`` with ``error``, ``median``, quantiles and ``max`` of the KL divergence in nats per
        token; ``same_top`` in %; ``probability_change`` (mean) and ``rms_probability_change`` of
        the token that follows, in %; ``perplexity``, ``reference_perplexity`` and their ratio with
        its error; ``tokens``. The divergence is exact up to a vocabulary of ``top``, above it the
        tail counts as one outcome (a lower bound).

    Raises:
        InputError: The models' vocabularies differ, or one of them computes NaN.
    """
    journal = Journal.open(
        {
            "task": "kl",
            "model": model.key(),
            "reference": reference.key(),
            "tokens": digest_of(tokens),
            "top": top,
        }
    )
    missing_sequences = [n for n in range(len(tokens)) if journal.arrays(f"sequence-{n}") is None]
    missing = [n for n in missing_sequences if journal.arrays(f"reference-{n}") is None]
    if missing:
        loaded, _ = reference.load()
        for n in _bar(missing, f"Reference {reference.name}", progress):
            kept = _kept(loaded, tokens[n], top, chunk)
            check_numbers(f"the baseline {reference.name}", n, kept["target"], kept["log_probs"])
            journal.put_arrays(f"reference-{n}", **kept)
        del loaded
        mx.clear_cache()
    if missing_sequences:
        loaded, _ = model.load()
        for n in _bar(missing_sequences, f"KL {model.label}", progress):
            kept = journal.arrays(f"reference-{n}")
            if kept is None:
                raise InputError(f"{journal.folder} changed while it was used: run it again")
            held = _held_against(loaded, tokens[n], kept, chunk)
            check_numbers(model.name, n, held["target"], held["kl"])
            journal.put_arrays(f"sequence-{n}", **held)
            journal.drop_arrays(f"reference-{n}")
        del loaded
        mx.clear_cache()
    found = [journal.arrays(f"sequence-{n}") for n in range(len(tokens))]
    return figures([each for each in found if each is not None])


def digest_of(tokens: np.ndarray) -> str:
    """Hash of token sequences."""
    return f"{tokens.shape}-{hashlib.sha256(tokens.tobytes()).hexdigest()}"


def check_numbers(name: str, sequence: int, *arrays: np.ndarray) -> None:
    """Refuse the figures of a model that computes NaN.

    Raises:
        InputError: An array contains NaN; the message names the model.
    """
    if any(np.isnan(each).any() for each in arrays):
        raise InputError(
            f"{name} computes NaN in sequence {sequence + 1} of the data: its weights are damaged "
            "or overflow, so that nothing can be said of it"
        )


def _bar(items: list[int], label: str, progress: bool) -> Any:
    return tqdm(items, desc=label[-40:], disable=not progress)


def _kept(model: Any, tokens: np.ndarray, top: int, chunk: int) -> dict[str, np.ndarray]:
    """The part of the reference's distributions that is kept, for each token but the last."""
    parts: dict[str, list[np.ndarray]] = {
        name: [] for name in ("indices", "log_probs", "rest", "top", "target")
    }
    width = 0
    for start, logits in logits_of(model, tokens, chunk):
        width, logits = logits.shape[-1], logits[:, : len(tokens) - 1 - start]
        if not logits.shape[1]:
            continue
        reference = Reference.of(logits, top)
        parts["indices"].append(np.array(reference.indices[0]).astype(np.int32))
        parts["log_probs"].append(np.array(reference.log_probs[0]))
        parts["rest"].append(np.array(reference.rest[0]))
        parts["top"].append(np.array(mx.argmax(logits[0], axis=-1)))
        following = tokens[start + 1 : start + 1 + logits.shape[1]]
        parts["target"].append(np.array(target_log_probs(logits, following)))
    kept = {name: np.concatenate(each) for name, each in parts.items()}
    return {**kept, "width": np.array([width])}


def _held_against(
    model: Any, tokens: np.ndarray, kept: dict[str, np.ndarray], chunk: int
) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("kl", "same", "target")}
    for start, logits in logits_of(model, tokens, chunk):
        if logits.shape[-1] != int(kept["width"][0]):
            raise InputError(
                f"the model has logits for {logits.shape[-1]} tokens and the baseline for "
                f"{int(kept['width'][0])}: compare models of one vocabulary"
            )
        logits = logits[:, : len(tokens) - 1 - start]
        if not logits.shape[1]:
            continue
        at = slice(start, start + logits.shape[1])
        reference = Reference(
            mx.array(kept["indices"][at])[None],
            mx.array(kept["log_probs"][at])[None],
            mx.array(kept["rest"][at])[None],
        )
        following = tokens[start + 1 : start + 1 + logits.shape[1]]
        parts["kl"].append(np.array(reference.divergence(logits)[0]))
        parts["same"].append(np.array(mx.argmax(logits[0], axis=-1)) == kept["top"][at])
        parts["target"].append(np.array(target_log_probs(logits, following)))
    return {
        **{name: np.concatenate(each) for name, each in parts.items()},
        "reference": kept["target"],
    }


def figures(found: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Figures over sequences: ``kl``, ``same``, ``target``, ``reference``, each (positions,)."""
    divergence = [each["kl"].astype(float) for each in found]
    every = np.concatenate(divergence)
    same = [each["same"].astype(float) for each in found]
    model = [each["target"].astype(float) for each in found]
    reference = [each["reference"].astype(float) for each in found]
    changes = [np.exp(m) - np.exp(r) for m, r in zip(model, reference, strict=True)]
    worse = [r - m for m, r in zip(model, reference, strict=True)]
    ratio = math.exp(float(np.concatenate(worse).mean()))
    change = np.concatenate(changes)
    quantiles = {
        "median" if q == 50 else f"p{q:g}": float(np.quantile(every, q / 100)) for q in QUANTILES
    }
    return {
        "mean": float(every.mean()),
        "error": clustered_error(divergence),
        **quantiles,
        "max": float(every.max()),
        "same_top": 100 * float(np.concatenate(same).mean()),
        "same_top_error": 100 * clustered_error(same),
        "probability_change": 100 * float(change.mean()),
        "rms_probability_change": 100 * float(np.sqrt((change**2).mean())),
        "perplexity": math.exp(-float(np.concatenate(model).mean())),
        "reference_perplexity": math.exp(-float(np.concatenate(reference).mean())),
        "perplexity_ratio": ratio,
        "perplexity_ratio_error": ratio * clustered_error(worse),
        "tokens": float(len(every)),
    }
