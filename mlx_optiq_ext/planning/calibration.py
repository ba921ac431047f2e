"""Calibration text, cut into sequences of tokens."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import distributed
from ..errors import InputError
from ..model.vocabulary import check_tokens, embedding_rows
from .texts import Text, read_texts, stock_text, tokenized


@dataclass(frozen=True)
class Sampling:
    """How calibration sequences are cut from a text.

    Attributes:
        length: Tokens of a sequence; a shorter text is one sequence of all its tokens.
        count: Sequences to plan with, spread evenly over the text.
        held_out_every: One in this many sequences is held out to judge finished plans.
        refining: Most sequences for GPTQ-style rounding and distillation, including those measured
            on and those held out.
    """

    length: int = 256
    count: int = 16
    held_out_every: int = 4
    refining: int = 256


DEFAULT = Sampling()


@dataclass(frozen=True)
class Calibration:
    """Calibration sequences and where they come from.

    Attributes:
        tokens: Sequences to plan with, int32 (sequences, length).
        source: A file's name, ``"mlx-lm"`` or ``"sampled from the model"``.
        more: Further sequences of the same text, int32 (n, length), for refinement only.
        held_out_every: One in this many of ``tokens`` is held out.
    """

    tokens: np.ndarray
    source: str
    more: np.ndarray | None = None
    held_out_every: int = DEFAULT.held_out_every

    @property
    def digest(self) -> str:
        """Hash of the tokens, which keys stored measurements."""
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()

    @property
    def whole_digest(self) -> str:
        """Hash of all sequences."""
        more = b"" if self.more is None else self.more.tobytes()
        return hashlib.sha256(self.tokens.tobytes() + more).hexdigest()

    @property
    def measured(self) -> np.ndarray:
        """Sequences for measurements, (n, length)."""
        if len(self.tokens) < 2:
            return self.tokens
        return np.delete(self.tokens, self._held_out, axis=0)

    @property
    def refining(self) -> np.ndarray:
        """Sequences to refine on, (n, length): all but the held-out ones."""
        if self.more is None:
            return self.measured
        return np.concatenate([self.measured, self.more])

    @property
    def held_out(self) -> np.ndarray:
        """Sequences for judging plans, (n, length); all sequences if there are too few."""
        return self.tokens[self._held_out] if self.holds_out else self.tokens

    @property
    def holds_out(self) -> bool:
        """Whether plans are judged on sequences that were not measured on."""
        return len(self.tokens) >= self.held_out_every

    @property
    def _held_out(self) -> slice:
        return slice(self.held_out_every - 1, None, self.held_out_every)


def from_texts(
    texts: list[Text], tokenizer: Any, source: str, sampling: Sampling = DEFAULT
) -> Calibration:
    """Tokenize texts and take evenly spread sequences.

    Args:
        texts: Joined in this order.
        tokenizer: Whose chat template renders messages.
        source: For `Calibration`.
        sampling: Length and number of the sequences.

    Raises:
        InputError: The texts have fewer than two tokens.
    """
    tokens = tokenized(texts, tokenizer)
    if len(tokens) < 2:
        raise InputError(f"the calibration data ({source}) has no tokens: give it some text")
    sequences = cut(tokens, min(sampling.length, len(tokens)))
    chosen = spread(len(sequences), sampling.count)
    others = np.delete(sequences, chosen, axis=0)
    wanted = min(len(others), sampling.refining - len(chosen))
    more = others[spread(len(others), wanted)] if wanted > 0 else None
    planned = np.ascontiguousarray(sequences[chosen])
    return Calibration(planned, source, more, sampling.held_out_every)


def cut(tokens: np.ndarray, length: int) -> np.ndarray:
    """Tokens (n,) as sequences (n // length, length); the rest is left out."""
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def spread(total: int, count: int) -> np.ndarray:
    """At most ``count`` indices below ``total``, the first and the last among them."""
    return np.unique(np.linspace(0, max(total - 1, 0), count).round().astype(int))


def sampled(
    model: Any, tokenizer: Any, sampling: Sampling = DEFAULT, *, seed: int = 0
) -> Calibration:
    """Text sampled from the model itself at temperature 1, if there is no other text.

    Its sequences are half as long as ``sampling`` says: drawing them is slow.
    """
    start = _start(tokenizer, sampling.count, seed, embedding_rows(model))
    tokens = np.stack(list(_sample(model, start, sampling.length // 2, seed)), axis=1)
    every = sampling.held_out_every
    return Calibration(tokens.astype(np.int32), "sampled from the model", None, every)


def _start(tokenizer: Any, count: int, seed: int, rows: int | None) -> np.ndarray:
    rng = np.random.default_rng(seed)
    special = set(getattr(tokenizer, "all_special_ids", None) or [])
    known = tokenizer.vocab_size if rows is None else min(rows, tokenizer.vocab_size)
    ordinary = [t for t in range(known) if t not in special]
    return rng.choice(ordinary, size=count)


def _sample(model: Any, start: np.ndarray, length: int, seed: int) -> Iterator[np.ndarray]:
    from mlx_lm.models.cache import make_prompt_cache

    cache, token, key = make_prompt_cache(model), mx.array(start), mx.random.key(seed)
    yield start
    for _ in range(length - 1):
        key, draw = mx.random.split(key)
        logits = model(token[:, None], cache=cache)[:, -1].astype(mx.float32)
        token = mx.random.categorical(logits, key=draw)
        yield np.array(token)


def load_calibration(
    model: nn.Module,
    tokenizer: Any,
    path: Path | None,
    say: Callable[[str], None] = print,
    sampling: Sampling = DEFAULT,
) -> Calibration:
    """Calibration sequences from a file, else mlx-lm's own text, else drawn from the model.

    Each process reads its own file. Text that is not from a file is found by process 0 for all.

    Args:
        model: An mlx-lm model.
        tokenizer: The model's tokenizer.
        path: A file for `read_texts`, or None.
        say: Receives one-line messages.
        sampling: Length and number of the sequences.

    Raises:
        InputError: The file cannot be used, or its tokens are not the model's.
    """
    found = _texts(path, say)
    if found is not None:
        data = from_texts(found[0], tokenizer, found[1], sampling)
        check_tokens(model, data.refining)
        check_tokens(model, data.tokens)
        return data
    return distributed.first(lambda: sampled(model, tokenizer, sampling))


def load_tokens(
    model: nn.Module, tokenizer: Any, path: Path | None, say: Callable[[str], None] = print
) -> tuple[np.ndarray, str]:
    """The whole text of `load_calibration` as one row of int32 tokens, and its source."""
    found = _texts(path, say)
    if found is not None:
        tokens = tokenized(found[0], tokenizer)
        check_tokens(model, tokens)
        return tokens, found[1]
    drawn = distributed.first(lambda: sampled(model, tokenizer))
    return drawn.tokens.ravel(), drawn.source


def _texts(path: Path | None, say: Callable[[str], None]) -> tuple[list[Text], str] | None:
    """Texts and their source; None, and a line that says why, if the model must be sampled."""
    if path is not None:
        return read_texts(path), path.name
    text, reason = distributed.first(_stock)
    if text is not None:
        return [text], "mlx-lm"
    say(
        f"[optiq] {reason}: calibrating on text sampled from the model itself "
        "(--optiq-calibration FILE gives better plans)"
    )
    return None


def _stock() -> tuple[str | None, str]:
    try:
        return stock_text(), ""
    except InputError as error:
        return None, str(error)
