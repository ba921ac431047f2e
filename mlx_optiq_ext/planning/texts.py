"""Calibration texts: a user's file, or mlx-lm's own text."""

from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..errors import InputError

#: A plain text, or the messages of a chat.
Text = str | list[dict[str, str]]


def read_texts(path: Path) -> list[Text]:
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
        lines = list(files.read_lines(path))
    except InputError as error:
        raise InputError(
            f"cannot read the calibration file {path} ({error}): give a UTF-8 .txt or .jsonl file"
        ) from error
    if path.suffix == ".jsonl":
        texts = [_line(path, number, line) for number, line in lines]
    else:
        texts: list[Text] = [files.read_text(path)] if lines else []
    if not texts:
        raise InputError(f"the calibration file {path} is empty: give it some text")
    return texts


def _line(path: Path, number: int, line: str) -> Text:
    record = files.parse_json(line, f"{path}, line {number}", files.REQUEST)
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return record["text"]
        messages = record.get("messages")
        if isinstance(messages, list) and messages and all(map(_is_message, messages)):
            return messages
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


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def stock_text() -> str:
    """mlx-lm's own calibration text, which its first use downloads.

    Raises:
        InputError: The text is not cached and cannot be downloaded; the message says why.
    """
    path = Path.home() / ".cache" / "mlx-lm" / "calibration_v5.txt"
    start = "mlx-lm's calibration text is not cached"
    if not path.exists():
        try:
            from mlx_lm.quant.utils import load_data

            load_data(_Stopping(), 0, 1)
        except _Downloaded:
            pass
        except (ImportError, OSError, HTTPException) as error:
            raise InputError(f"{start} and cannot be downloaded ({error})") from error
    try:
        text = files.read_text(path)
    except InputError as error:
        if not path.exists():
            raise InputError(f"{start}: this mlx-lm does not keep it in {path}") from error
        raise InputError(f"mlx-lm's calibration text in {path} cannot be read ({error})") from error
    if not text.strip():
        raise InputError(f"mlx-lm's calibration text in {path} is empty")
    return text


class _Downloaded(Exception):
    pass


class _Stopping:
    """A tokenizer that lets mlx-lm download its text, and stops it before tokenization."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        raise _Downloaded


def tokenized(texts: list[Text], tokenizer: Any) -> np.ndarray:
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
