"""JSON from untrusted files: its memory and depth are checked before it is parsed.

Python's parser has no limits: one byte of ``[`` becomes a list of 88 bytes, deep nesting raises
RecursionError, the last of two equal keys wins, and NaN is accepted. The limits here are checked on
the text, in one pass with constant memory. Format: RFC 8259.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .reading import MEGABYTE, decoded, read_bytes

#: Bytes that a value, a key and a container may take in memory, rounded up.
VALUE_BYTES, KEY_BYTES, CONTAINER_BYTES = 64, 128, 256

#: Digits of an integer. Tokenizers write int(1e30) for no limit.
DIGITS = 40
#: Characters of a non-integer number, and of a key.
NUMBER, KEY = 128, 512

_BLOCK = MEGABYTE
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Limits:
    """Limits of a document.

    Attributes:
        size: Bytes of its text.
        memory: Bytes that its values may take in memory.
        depth: Nesting of arrays and objects.
        infinity: Whether ``Infinity`` is a number in it, as a few models' configs have it.
    """

    size: int = 16 * MEGABYTE
    memory: int = 128 * MEGABYTE
    depth: int = 100
    infinity: bool = False


DEFAULT = Limits()
#: config.json of a model: ``time_step_limit`` of Mamba models may be Infinity.
MODEL_CONFIG = Limits(infinity=True)
#: Labels of images: those of COCO's validation set take 20 MB with their outlines.
LABELS = Limits(size=48 * MEGABYTE, memory=320 * MEGABYTE)
#: One line or one request.
REQUEST = Limits(size=4 * MEGABYTE, memory=64 * MEGABYTE)


def read_json(path: Path, limits: Limits = DEFAULT) -> Any:
    """Read JSON.

    Raises:
        InputError: The file is missing, unreadable, no regular file, not UTF-8, not JSON or beyond
            its limits; a key stands twice in one object, or a number is not finite.
    """
    return parse_json(read_bytes(path, limits.size), str(path), limits)


def parse_json(content: bytes | str, where: str, limits: Limits = DEFAULT) -> Any:
    """Parse JSON.

    Args:
        content: The text; UTF-8 if it comes as bytes.
        where: The place to name in messages, such as a file and a line.
        limits: Limits of the text.

    Raises:
        InputError: As for `read_json`.
    """
    try:
        encoded = content.encode("utf-8") if isinstance(content, str) else content
    except UnicodeEncodeError as error:
        raise InputError(f"{where} is not text that UTF-8 can hold: correct it") from error
    if len(encoded) > limits.size:
        raise InputError(f"{where} is longer than {limits.size / MEGABYTE:.0f} MB: shorten it")
    text = content if isinstance(content, str) else decoded(content, where)
    _check_structure(encoded, where, limits)
    value = _parsed(text, where, limits)
    if _SURROGATE.search(text):
        _check_surrogates(value, where)
    return value


def _parsed(text: str, where: str, limits: Limits) -> Any:
    def constant(name: str) -> float:
        if name == "NaN" or not limits.infinity:
            raise InputError(f"{where} holds {name}, which is no number: give a finite one")
        return float(name)

    def integer(digits: str) -> int:
        if len(digits) > DIGITS:
            raise InputError(f"{where} holds an integer of {len(digits)} digits: correct it")
        return int(digits)

    def number(digits: str) -> float:
        if len(digits) > NUMBER:
            raise InputError(f"{where} holds a number of {len(digits)} characters: shorten it")
        value = float(digits)
        if not math.isfinite(value):
            raise InputError(f"{where} holds {digits}, which is infinite: give a finite number")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if any(len(key) > KEY for key in found):
            raise InputError(f"{where} has a key of more than {KEY} characters: shorten it")
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise InputError(f"{where} has {twice[:80]!r} twice in one object: remove one of them")
        return found

    try:
        return json.loads(
            text,
            object_pairs_hook=unique,
            parse_int=integer,
            parse_float=number,
            parse_constant=constant,
        )
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}): check that it is complete") from error


def _check_structure(content: bytes, where: str, limits: Limits) -> None:
    """Depth and memory of a document, counted without building it.

    A text that is not JSON may be counted wrongly, but only after the place where parsing ends.
    """
    # Then every quote left begins or ends a string.
    plain = np.frombuffer(content.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    inside = depth = 0
    memory = 2 * len(content)
    for start in range(0, len(plain), _BLOCK):
        block = plain[start : start + _BLOCK]
        quotes = np.cumsum(block == ord('"'), dtype=np.int32) + inside
        inside = int(quotes[-1]) & 1
        block = np.where(quotes & 1, 0, block)
        opens = (block == ord("[")) | (block == ord("{"))
        closes = (block == ord("]")) | (block == ord("}"))
        levels = np.cumsum(opens.astype(np.int32) - closes, dtype=np.int32) + depth
        depth = int(levels[-1])
        memory += CONTAINER_BYTES * int(np.count_nonzero(opens))
        memory += KEY_BYTES * int(np.count_nonzero(block == ord(":")))
        memory += VALUE_BYTES * int(np.count_nonzero(block == ord(",")))
        if levels.max() > limits.depth:
            raise InputError(f"{where} is nested deeper than {limits.depth} levels: flatten it")
        if memory > limits.memory:
            raise InputError(
                f"{where} holds more values than fit in {limits.memory / MEGABYTE:.0f} MB of "
                "memory: is it another file?"
            )


def _check_surrogates(value: Any, where: str) -> None:
    # Half a surrogate pair is a string to Python that can be neither printed nor written.
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half a surrogate pair: it is no text") from error
