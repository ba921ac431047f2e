"""Token sequences of the evaluation text."""

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..planning.texts import read_texts, tokenized

#: Tokens of a sequence.
CONTEXT = 512


def read_data(path: Path | None) -> list[Any]:
    """Texts and chats of a ``.txt`` or ``.jsonl`` file.

    Raises:
        InputError: None was given, or it is missing, empty or malformed.
    """
    if path is None:
        raise InputError("this task needs text: name a .txt or .jsonl file with --optiq-data")
    try:
        return read_texts(path)
    except InputError as error:
        raise InputError(str(error).replace("calibration file", "data file")) from error


def sequences(
    texts: list[Any], tokenizer: Any, context: int = CONTEXT, limit: int | None = None
) -> np.ndarray:
    """Consecutive sequences of tokens, (sequences, context).

    Raises:
        InputError: The text is shorter than two tokens.
    """
    tokens = tokenized(texts, tokenizer)
    if len(tokens) < 2:
        raise InputError("the data file has no tokens: give it some text")
    context = min(context, len(tokens))
    count = len(tokens) // context
    found = tokens[: count * context].reshape(count, context)
    return found[:limit]
