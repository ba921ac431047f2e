"""Text of several kinds, drawn from a model itself for want of any other.

A model's own text holds no surprise: it expects all of it. A plan made on such text keeps what the
model does there and loses the rest, so that its KL on others' text is far above the one measured.
Therefore half of the sequences have tokens in them that the model would hardly have written, and
half begin as a document does.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..model.vocabulary import embedding_rows

#: Share of tokens drawn blindly, in every other kind of text.
SURPRISES = 0.125
#: Kinds of text, by whether they begin a document and their share of surprises.
KINDS = ((False, 0.0), (True, 0.0), (False, SURPRISES), (True, SURPRISES))


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a model without a tokenizer, for which mlx-lm makes an empty one.

    Raises:
        InputError: The tokenizer knows no token.
    """
    if hasattr(tokenizer, "vocab_size") and not ordinary(tokenizer):
        name = getattr(tokenizer, "name_or_path", None) or "this model"
        raise InputError(
            f"{name} has no tokenizer, which reading a text needs: put its tokenizer files "
            "(tokenizer.json, tokenizer_config.json) beside the weights"
        )


def ordinary(tokenizer: Any, rows: int | None = None) -> list[int]:
    """Tokens that stand for text.

    Args:
        tokenizer: Whose tokens.
        rows: Of the embedding, beyond which there are none.
    """
    special = set(getattr(tokenizer, "all_special_ids", None) or [])
    known = tokenizer.vocab_size if rows is None else min(rows, tokenizer.vocab_size)
    return [t for t in range(known) if t not in special]


def generated(
    model: Any, tokenizer: Any, count: int, length: int, *, each: int = 1, seed: int = 0
) -> np.ndarray:
    """Sequences drawn from the model at temperature 1, of each of `KINDS` in turn.

    Args:
        model: An mlx-lm model.
        tokenizer: Its tokenizer.
        count: Sequences.
        length: Tokens of each.
        each: Sequences of one kind in a row.
        seed: Of the draws.

    Returns:
        int32 (count, length).
    """
    check_tokenizer(tokenizer)
    rng, words = np.random.default_rng(seed), ordinary(tokenizer, embedding_rows(model))
    kinds = [KINDS[(index // each) % len(KINDS)] for index in range(count)]
    start, first = rng.choice(words, size=count), getattr(tokenizer, "bos_token_id", None)
    if first is not None:
        start = np.where([begins for begins, _ in kinds], first, start)
    blind = rng.random((length, count)) < [share for _, share in kinds]
    drawn = np.where(blind, rng.choice(words, size=(length, count)), -1)
    tokens = np.stack(list(_generate(model, start, drawn, seed)), axis=1)
    return tokens.astype(np.int32)


def _generate(model: Any, start: np.ndarray, drawn: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """One token of every sequence at a time, (count,).

    Args:
        model: An mlx-lm model.
        start: First tokens, (count,).
        drawn: Tokens to take in place of the model's, (length, count); -1 where there is none.
        seed: Of the model's draws.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache, token, key = make_prompt_cache(model), mx.array(start), mx.random.key(seed)
    yield start
    for instead in mx.array(drawn[1:]):
        key, draw = mx.random.split(key)
        logits = model(token[:, None], cache=cache)[:, -1].astype(mx.float32)
        token = mx.where(instead < 0, mx.random.categorical(logits, key=draw), instead)
        yield np.array(token)
