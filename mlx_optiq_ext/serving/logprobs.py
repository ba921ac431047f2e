"""Log probabilities in an answer."""

import math
from typing import Any


def finite(value: Any) -> Any:
    """A JSON value with null in place of NaN and infinities, which JSON does not have.

    Logits that overflow have such log probabilities.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value
