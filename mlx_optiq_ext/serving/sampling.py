"""Sampler parameters that mlx-lm's server does not survive, refused before it meets them.

An exception where tokens are sampled ends the generation thread, and with it the server. Logits
that are not finite, or a biased token that does not exist, can end the process.
"""

import math
from collections.abc import Mapping
from typing import Any

from .refusal import Refusal

#: Lowest and highest values that keep logits finite, in 16 bits too. 0 turns a penalty off.
RANGES = {
    "temperature": (1e-30, 1e6),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "repetition_penalty": (1e-3, 1e3),
    "presence_penalty": (-1e3, 1e3),
    "frequency_penalty": (-1e3, 1e3),
}
#: Numbers of tokens; Python's slices take no larger ones.
SIZES = ("repetition_context_size", "presence_context_size", "frequency_context_size")
LARGEST = 2**31 - 1
#: Highest bias of a token, and of a token when all tokens have one.
BIAS, EVERY_BIAS = 1e9, 1e4


def check(fields: Mapping[str, Any], vocabulary: int | None) -> None:
    """Refuse values that would end the generation thread.

    Values of a wrong type are left to mlx-lm where it says so itself.

    Args:
        fields: The request's parameters by name, as OpenAI and mlx-lm call them.
        vocabulary: Tokens that the model has logits for; None if it is not known.

    Raises:
        Refusal: 400, which names the field.
    """
    for name, (low, high) in RANGES.items():
        value = fields.get(name)
        if isinstance(value, int | float) and not (value == 0 or _inside(value, low, high)):
            raise _refused(name, f"must be 0 or from {low:g} to {high:g}")
    for name in SIZES:
        value = fields.get(name)
        if isinstance(value, int) and not 0 <= value <= LARGEST:
            raise _refused(name, f"must be from 0 to {LARGEST}")
    threshold, sampled = fields.get("xtc_threshold"), fields.get("temperature")
    if fields.get("xtc_probability") and isinstance(threshold, float) and threshold > 0.5:
        raise _refused("xtc_threshold", "must be at most 0.5")
    top_k = fields.get("top_k")
    # At temperature 0 it is not looked at.
    if vocabulary and sampled and isinstance(top_k, int) and top_k >= vocabulary:
        raise _refused("top_k", f"must be below {vocabulary}, the size of the vocabulary")
    if fields.get("top_logprobs") is True:
        raise _refused("top_logprobs", "must be a number")
    seed = fields.get("seed")
    if isinstance(seed, int) and not 0 <= seed < 2**64:
        raise _refused("seed", "must be from 0 to 2**64 - 1")
    _check_bias(fields.get("logit_bias"), vocabulary)
    _check_stop(fields.get("stop"))


def check_prompt(prompt: Any) -> None:
    """Refuse what a tokenizer made of a request if it is no text.

    Args:
        prompt: Should be a list of token numbers.

    Raises:
        ValueError: It is empty, a batch, or an array.
    """
    if not isinstance(prompt, list | tuple) or not all(isinstance(t, int) for t in prompt):
        raise ValueError("the prompt is not one text")
    if not prompt:
        raise ValueError("the prompt is empty")


def vocabulary_of(model: Any) -> int | None:
    """Tokens that a model of mlx-lm has logits for; None if its arguments do not say."""
    arguments = getattr(model, "args", None)
    for holder in (arguments, _get(arguments, "text_config")):
        size = _get(holder, "vocab_size")
        if isinstance(size, int) and size > 0:
            return size
    return None


def _get(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


def _inside(value: float, low: float, high: float) -> bool:
    # Python compares integers of any size, and NaN is inside of nothing.
    return low <= value <= high


def _check_bias(bias: Any, vocabulary: int | None) -> None:
    if not isinstance(bias, Mapping):
        return
    for token, value in bias.items():
        try:
            number, amount = int(token), float(value)
        except (TypeError, ValueError, OverflowError):
            raise _refused("logit_bias", "must give a number for each token's number") from None
        if not 0 <= number < (vocabulary or LARGEST):
            raise _refused("logit_bias", "names a token that the model does not have")
        if not math.isfinite(amount) or abs(amount) > BIAS:
            raise _refused("logit_bias", f"must be from {-BIAS:g} to {BIAS:g}")
    if vocabulary and len(bias) >= vocabulary and any(abs(v) > EVERY_BIAS for v in bias.values()):
        raise _refused("logit_bias", f"must be within {EVERY_BIAS:g} if all tokens have one")


def _check_stop(stop: Any) -> None:
    if not stop:
        return
    words = [stop] if isinstance(stop, str) else stop
    if not isinstance(words, list | Mapping) or not all(map(_is_text, words)):
        raise _refused("stop", "must be a text or a list of texts")


def _is_text(value: Any) -> bool:
    try:
        value.encode()
    except (AttributeError, UnicodeEncodeError):  # JSON can hold half of a surrogate pair
        return False
    return isinstance(value, str)


def _refused(param: str, message: str) -> Refusal:
    return Refusal(400, f"{param} {message}", "invalid_value", param)
