"""Perplexity over long sequences, computed through the model's own cache."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from .journal import Journal
from .models import Subject
from .statistics import clustered_error
from .token_divergence import check_numbers, digest_of, logits_of, target_log_probs


def losses(model: Subject, tokens: np.ndarray, *, progress: bool = True) -> list[np.ndarray]:
    """Negative log-likelihood in nats of each token but the first, per sequence.

    Args:
        model: The model, with its KV plan if it has one.
        tokens: int32 (sequences, context).
        progress: Whether to show a progress bar.

    Raises:
        InputError: The model computes NaN.
    """
    journal = Journal.open(
        {"task": "perplexity", "model": model.key(), "tokens": digest_of(tokens)}
    )
    missing = [n for n in range(len(tokens)) if journal.arrays(f"sequence-{n}") is None]
    if missing:
        loaded, _ = model.load()
        for n in tqdm(missing, desc=f"Perplexity {model.label}"[-50:], disable=not progress):
            loss = _losses(loaded, tokens[n])
            check_numbers(model.name, n, loss)
            journal.put_arrays(f"sequence-{n}", loss=loss)
        del loaded
        mx.clear_cache()
    found = [journal.arrays(f"sequence-{n}") for n in range(len(tokens))]
    return [each["loss"].astype(float) for each in found if each is not None]


def _losses(model: Any, tokens: np.ndarray) -> np.ndarray:
    parts = []
    for start, logits in logits_of(model, tokens):
        following = tokens[start + 1 : start + 1 + logits.shape[1]]
        if len(following):
            parts.append(-np.array(target_log_probs(logits, following)))
    return np.concatenate(parts)


def figures(own: list[np.ndarray]) -> dict[str, float]:
    """Perplexity with its standard error over sequences."""
    every = np.concatenate(own)
    value = math.exp(float(every.mean()))
    return {
        "perplexity": value,
        "perplexity_error": value * clustered_error(own),
        "tokens": float(len(every)),
    }


def ratio(own: list[np.ndarray], other: list[np.ndarray]) -> dict[str, float]:
    """Perplexity over another's on the same tokens, with the error of the paired difference."""
    worse = [a - b for a, b in zip(own, other, strict=True)]
    value = math.exp(float(np.concatenate(worse).mean()))
    return {"perplexity_ratio": value, "perplexity_ratio_error": value * clustered_error(worse)}
