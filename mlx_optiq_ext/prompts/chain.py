"""Keys of blocks: each is a hash of everything that its block depends on.

A block's key covers the space (model, cache layout, KV plan, adapters) and all tokens up to the
block's end. So equal prefixes have equal keys, and a block is only found behind its own prefix.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

#: Tokens of a block.
BLOCK = 256

#: Characters of a key.
LENGTH = 40


def keys(space: str, tokens: Sequence[int], block: int = BLOCK) -> list[str]:
    """The key of the empty prefix, then that of each whole block.

    Args:
        space: Digest of what the tokens were computed with.
        tokens: The prompt.
        block: Tokens of a block.
    """
    found = [_digest(space, b"")]
    for start in range(0, len(tokens) - block + 1, block):
        found.append(tail_key(found[-1], tokens[start : start + block]))
    return found


def tail_key(parent: str, tokens: Sequence[int]) -> str:
    """The key of a prefix that goes on behind a block."""
    return _digest(parent, np.array(tokens, dtype=np.uint32).tobytes())


def keyable(tokens: Sequence[int]) -> bool:
    """Whether all tokens are ids of text; mlx-lm marks images with negative numbers."""
    return all(type(token) is int and 0 <= token < 1 << 32 for token in tokens)


def _digest(parent: str, content: bytes) -> str:
    return hashlib.sha256(parent.encode() + b"\0" + content).hexdigest()[:LENGTH]
