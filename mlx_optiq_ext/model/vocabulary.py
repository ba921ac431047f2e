"""Whether the tokens of a text are tokens of a model."""

from typing import Any

import mlx.nn as nn
import numpy as np

from ..errors import InputError
from .config import is_embedding


def embedding_rows(model: nn.Module) -> int | None:
    """Tokens that a model's embedding has a row for, or None if it does not name its embedding."""
    for path, module in model.named_modules():
        if is_embedding(path) and "weight" in module:
            return module.weight.shape[0]
    return None


def check_tokens(model: nn.Module, tokens: Any) -> None:
    """Refuse tokens that a model has no embedding of.

    MLX looks such rows up outside of the array, and in a backward pass it writes there.

    Args:
        model: An mlx-lm model.
        tokens: Whole numbers of any shape, as numpy takes them.

    Raises:
        InputError: There is such a token; the message names it.
    """
    found, rows = np.asarray(tokens), embedding_rows(model)
    if rows is not None and found.size and not 0 <= int(found.min()) <= int(found.max()) < rows:
        wrong = found.max() if found.max() >= rows else found.min()
        raise InputError(
            f"the tokenizer makes token {wrong} of the text, and the model's embedding has "
            f"{rows:,} rows: take the tokenizer that belongs to this model"
        )
