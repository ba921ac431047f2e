"""Calibration text, cut into sequences of tokens."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from .. import distributed
from ..errors import InputError
from ..model.vocabulary import check_tokens
from .generation import check_tokenizer, generated
from .sampling import DEFAULT, Sampling, on_cpu
from .texts import Text, read_texts, stock_text, tokenized

#: Tokens of a text that say anything of a model.
LEAST = 256
#: Tokens below which plans suit the text and little else.
FEW = 2048

SAMPLED = "sampled from the model"


@dataclass(frozen=True)
class Calibration:
    """Calibration sequences and where they come from.

    Attributes:
        tokens: Sequences to plan with, int32 (sequences, length).
        source: A file's name, ``"mlx-lm"`` or `SAMPLED`.
        more: Further sequences of the same text, int32 (n, length), for refinement only.
        held_out_every: One in this many of ``tokens`` is held out.
        further: Sequences of that length for distillation only, int32 (n, length).
    """

    tokens: np.ndarray
    source: str
    more: np.ndarray | None = None
    held_out_every: int = DEFAULT.held_out_every
    further: np.ndarray | None = None

    @property
    def digest(self) -> str:
        """Hash of the tokens, which keys stored measurements."""
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()

    @property
    def whole_digest(self) -> str:
        """Hash of all sequences."""
        parts = [part for part in (self.tokens, self.more, self.further) if part is not None]
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

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
    def distilling(self) -> np.ndarray:
        """Sequences to distill on, (n, length): those to refine on, and further ones."""
        if self.further is None:
            return self.refining
        return np.concatenate([self.refining, self.further])

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
        InputError: The texts have fewer than two tokens, or the model has no tokenizer.
    """
    tokens = tokenized(texts, tokenizer)
    if len(tokens) < 2:
        raise InputError(f"the calibration data ({source}) has no tokens: give it some text")
    return sequences_of(tokens, source, sampling)


def sequences_of(tokens: np.ndarray, source: str, sampling: Sampling = DEFAULT) -> Calibration:
    """Evenly spread sequences of a text's tokens (n,)."""
    longest = max(len(tokens) // sampling.held_out_every, 2)
    sequences = cut(tokens, min(sampling.length, longest))
    chosen = spread(len(sequences), sampling.count)
    others = np.delete(sequences, chosen, axis=0)
    wanted = min(len(others), sampling.most - len(chosen))
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
    model: Any,
    tokenizer: Any,
    sampling: Sampling = DEFAULT,
    *,
    seed: int = 0,
    refining: bool = False,
    distilling: bool = False,
) -> Calibration:
    """Text sampled from the model itself, if there is no other text; of every kind one is held out.

    On a CPU its sequences are half as long as ``sampling`` says: drawing them is slow.

    Args:
        model: An mlx-lm model.
        tokenizer: The model's tokenizer.
        sampling: Length and number of the sequences.
        seed: Of the draws.
        refining: Whether to draw more of them, to refine on.
        distilling: Whether to draw more still, to distill on.
    """
    every, length = sampling.held_out_every, sampling.length // (2 if on_cpu() else 1)
    count = max(sampling.count, sampling.most if refining else 0)
    tokens = generated(model, tokenizer, count, length, each=every, seed=seed, kinds=sampling.kinds)
    planned, more = tokens[: sampling.count], tokens[sampling.count :]
    further = _further(model, tokenizer, length, sampling) if distilling else None
    return Calibration(planned, SAMPLED, more if len(more) else None, every, further)


def load_calibration(
    model: nn.Module,
    tokenizer: Any,
    path: Path | None,
    say: Callable[[str], None] = print,
    sampling: Sampling = DEFAULT,
    *,
    refining: bool = False,
    distilling: bool = False,
) -> Calibration:
    """Calibration sequences from a file, else mlx-lm's own text, else drawn from the model.

    Each process reads its own file. Text that is not from a file is found by process 0 for all.

    Args:
        model: An mlx-lm model.
        tokenizer: The model's tokenizer.
        path: A file for `read_texts`, or None.
        say: Receives one-line messages.
        sampling: Length and number of the sequences.
        refining: Whether the weights will be refined, for which more text is drawn.
        distilling: Whether they will be distilled, for which still more is drawn.

    Raises:
        InputError: The file cannot be used or has fewer than `LEAST` tokens, its tokens are not
            the model's, no sequence can be held out, or the model has no tokenizer.
    """
    check_tokenizer(tokenizer)
    found = _texts(path, say)
    if found is None:
        wanted = {"refining": refining, "distilling": distilling}
        data = distributed.first(lambda: sampled(model, tokenizer, sampling, **wanted))
    else:
        tokens = tokenized(found[0], tokenizer)
        check_tokens(model, tokens)
        check_enough(tokens, found[1], say)
        drawn = sampling.drawn if refining else 0
        data = sequences_of(tokens, found[1], replace(sampling, refining=sampling.most - drawn))
        if drawn:
            data = distributed.first(lambda: _beside(model, tokenizer, data, drawn, sampling))
        if distilling:
            length = data.tokens.shape[1]
            more = distributed.first(lambda: _further(model, tokenizer, length, sampling))
            data = replace(data, further=more)
    if not data.holds_out:
        raise InputError(
            f"{len(data.tokens)} calibration sequences, one in {data.held_out_every} of which is "
            "held out to judge plans on, leave none: take more of them"
        )
    return data


def _beside(
    model: nn.Module, tokenizer: Any, data: Calibration, count: int, sampling: Sampling
) -> Calibration:
    """The same with further sequences, sampled from the model, to refine on."""
    length = data.tokens.shape[1]
    found = generated(model, tokenizer, count, length, seed=1, kinds=sampling.kinds)
    return replace(data, more=found if data.more is None else np.concatenate([data.more, found]))


def _further(
    model: nn.Module, tokenizer: Any, length: int, sampling: Sampling
) -> np.ndarray | None:
    """Sequences that are sampled from the model for distillation only."""
    if not sampling.distilled:
        return None
    return generated(model, tokenizer, sampling.distilled, length, seed=2, kinds=sampling.kinds)


def load_tokens(
    model: nn.Module, tokenizer: Any, path: Path | None, say: Callable[[str], None] = print
) -> tuple[np.ndarray, str]:
    """The whole text of `load_calibration` as one row of int32 tokens, and its source.

    Raises:
        InputError: As for `load_calibration`.
    """
    check_tokenizer(tokenizer)
    found = _texts(path, say)
    if found is not None:
        tokens = tokenized(found[0], tokenizer)
        check_tokens(model, tokens)
        check_enough(tokens, found[1], say)
        return tokens, found[1]
    drawn = distributed.first(lambda: sampled(model, tokenizer))
    return drawn.tokens.ravel(), drawn.source


def check_enough(tokens: np.ndarray, source: str, say: Callable[[str], None] = print) -> None:
    """Refuse a text of too few tokens (n,), and warn of one that has few.

    Raises:
        InputError: There are fewer than `LEAST`.
    """
    count = f"the calibration text ({source}) has {len(tokens):,} tokens"
    if len(tokens) < LEAST:
        raise InputError(
            f"{count}, too few to measure or judge anything on: give at least {LEAST}, better "
            f"{FEW:,} or more, with --optiq-calibration"
        )
    if len(tokens) < FEW:
        say(
            f"[optiq] Warning: {count}; with fewer than {FEW:,} a plan may suit this text and "
            "little else"
        )


def on(source: str) -> str:
    """How a figure names the text of a `Calibration.source` that it is on, behind "text"."""
    return f"{source} itself" if source == SAMPLED else f"of {source}"


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
