"""Calibration text as token windows."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import distributed
from ..errors import InputError

#: Tokens of one window, and how many windows to use.
WINDOW = 256
COUNT = 16
#: Every so many windows one is held out of the measurement, to judge finished plans on.
HELD_OUT = 4
#: Windows that refinement uses at most.
REFINING = 256


@dataclass(frozen=True)
class Calibration:
    """Token windows and where they come from.

    Attributes:
        tokens: int32 of shape (windows, window length).
        source: A file's name, ``"mlx-lm"`` or ``"sampled from the model"``.
        more: Further windows of the same text, (n, window length), for refinement only.
    """

    tokens: np.ndarray
    source: str
    more: np.ndarray | None = None

    @property
    def digest(self) -> str:
        """Hash of the tokens, which keys stored measurements."""
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()

    @property
    def whole_digest(self) -> str:
        """Hash of all windows."""
        more = b"" if self.more is None else self.more.tobytes()
        return hashlib.sha256(self.tokens.tobytes() + more).hexdigest()

    @property
    def measured(self) -> np.ndarray:
        """Windows to measure on."""
        if len(self.tokens) < 2:
            return self.tokens
        return np.delete(self.tokens, np.s_[HELD_OUT - 1 :: HELD_OUT], axis=0)

    @property
    def refining(self) -> np.ndarray:
        """Windows to refine on: all but the held-out ones."""
        if self.more is None:
            return self.measured
        return np.concatenate([self.measured, self.more])

    @property
    def held_out(self) -> np.ndarray:
        """Windows to judge plans on; those measured on when there are too few."""
        held_out = self.tokens[HELD_OUT - 1 :: HELD_OUT]
        return held_out if len(held_out) else self.tokens


def read_texts(path: Path) -> list[str | list[dict[str, str]]]:
    """Read a calibration file.

    Args:
        path: A ``.jsonl`` file with ``text``, ``messages``, ``prompt``/``completion`` or
            ``question``/``answer`` on each line, or a plain text file.

    Returns:
        Texts, and chat messages where a line has them.

    Raises:
        InputError: The file is missing, empty, not UTF-8, or a line has none of these fields.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the calibration file {path} ({error}): give a UTF-8 .txt or .jsonl file"
        ) from error
    if path.suffix != ".jsonl":
        texts: list[str | list[dict[str, str]]] = [content] if content.strip() else []
    else:
        lines = enumerate(content.splitlines(), 1)
        texts = [_line(path, number, line) for number, line in lines if line.strip()]
    if not texts:
        raise InputError(f"the calibration file {path} is empty: give it some text")
    return texts


def _line(path: Path, number: int, line: str) -> str | list[dict[str, str]]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}, line {number} is not JSON: {error}") from error
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return record["text"]
        if isinstance(record.get("messages"), list):
            return record["messages"]
        for first, second in (("prompt", "completion"), ("question", "answer")):
            if isinstance(record.get(first), str) and isinstance(record.get(second), str):
                return [
                    {"role": "user", "content": record[first]},
                    {"role": "assistant", "content": record[second]},
                ]
    raise InputError(
        f"{path}, line {number} has no text, messages, prompt and completion, or question and "
        "answer: give each line one of them"
    )


def from_texts(texts: list[str | list[dict[str, str]]], tokenizer: Any, source: str) -> Calibration:
    """Tokenize texts and take evenly spread windows."""
    tokens = tokenized(texts, tokenizer)
    if len(tokens) < 2:
        raise InputError(f"the calibration data ({source}) has no tokens: give it some text")
    length = min(WINDOW, len(tokens))
    windows = tokens[: len(tokens) // length * length].reshape(-1, length)
    chosen = np.unique(np.linspace(0, len(windows) - 1, COUNT).round().astype(int))
    others = np.delete(windows, chosen, axis=0)
    wanted = min(len(others), REFINING - len(chosen))
    spread = np.unique(np.linspace(0, max(len(others) - 1, 0), wanted).round().astype(int))
    more = others[spread] if wanted > 0 else None
    return Calibration(np.ascontiguousarray(windows[chosen]), source, more)


def tokenized(texts: list[str | list[dict[str, str]]], tokenizer: Any) -> np.ndarray:
    """All texts as one row of int32 tokens."""
    tokens: list[int] = []
    for text in texts:
        if isinstance(text, list):
            text = _render(text, tokenizer)
        tokens.extend(tokenizer.encode(text))
    return np.asarray(tokens, np.int32)


def _render(messages: list[dict[str, str]], tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(messages, tokenize=False)
    return "\n".join(str(message.get("content", "")) for message in messages) + "\n"


def stock_text() -> str | None:
    """mlx-lm's own calibration text if it is cached or can be downloaded, else None."""
    path = Path.home() / ".cache" / "mlx-lm" / "calibration_v5.txt"
    if not path.exists():
        from mlx_lm.quant.utils import load_data

        try:
            load_data(_NoTokenizer(), 0, WINDOW)
        except Exception:
            if not path.exists():
                return None
    try:
        return path.read_text(encoding="utf-8") or None
    except (OSError, UnicodeDecodeError):
        return None


class _NoTokenizer:
    """Lets mlx-lm download its text and stop before it tokenizes."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError("not needed")


def sampled(model: Any, tokenizer: Any, *, seed: int = 0) -> Calibration:
    """Text drawn from the model itself at temperature 1, for want of anything better."""
    rows = list(_sample(model, _start(tokenizer, seed), seed))
    return Calibration(np.stack(rows, axis=1).astype(np.int32), "sampled from the model")


def _start(tokenizer: Any, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    special = set(getattr(tokenizer, "all_special_ids", None) or [])
    ordinary = [t for t in range(tokenizer.vocab_size) if t not in special]
    return rng.choice(ordinary, size=COUNT)


def _sample(model: Any, start: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    from mlx_lm.models.cache import make_prompt_cache

    cache, token, key = make_prompt_cache(model), mx.array(start), mx.random.key(seed)
    yield start
    for _ in range(WINDOW // 2 - 1):
        key, draw = mx.random.split(key)
        logits = model(token[:, None], cache=cache)[:, -1].astype(mx.float32)
        token = mx.random.categorical(logits, key=draw)
        yield np.array(token)


def load_calibration(
    model: nn.Module, tokenizer: Any, path: Path | None, say: Callable[[str], None] = print
) -> Calibration:
    """Calibration windows from a file, else mlx-lm's own text, else drawn from the model.

    Each rank reads its own file; the others are rank 0's.
    """
    if path is not None:
        return from_texts(read_texts(path), tokenizer, path.name)
    text = distributed.first(stock_text)
    if text is not None:
        return from_texts([text], tokenizer, "mlx-lm")
    say(
        "[optiq] mlx-lm's calibration text is neither cached nor reachable: calibrating on text "
        "sampled from the model itself (--optiq-calibration FILE gives better plans)"
    )
    return distributed.first(lambda: sampled(model, tokenizer))
