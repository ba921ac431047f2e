"""Where the state of recurrent layers and sliding windows is kept while a prompt is computed."""

from collections.abc import Collection, Sequence
from itertools import pairwise

#: Tokens after which a long prompt is kept anyway.
STRIDE = 4096

#: Ends of messages, the last ones, at which a prompt is kept.
ENDS = 2


def places(prompt: Sequence[int], enders: Collection[int], stride: int = STRIDE) -> list[int]:
    """Lengths of a prompt, ascending: behind its last messages and every ``stride`` tokens.

    Args:
        prompt: The tokens.
        enders: Tokens that end a message.
        stride: Tokens between two places.
    """
    ends = [place + 1 for place, token in enumerate(prompt) if token in enders]
    return sorted({*ends[-ENDS:], *range(stride, len(prompt), stride)})


def divided(
    segments: Sequence[Sequence[int]],
    kinds: Sequence[str],
    enders: Collection[int],
    stride: int = STRIDE,
) -> tuple[list[list[int]], list[str]]:
    """Segments of a prompt, divided further at its `places`.

    mlx-lm's batch engine keeps the caches at the end of each segment but the last.

    Args:
        segments: The prompt's tokens, in parts.
        kinds: The kind of each part.
        enders: Tokens that end a message.
        stride: Tokens between two places.

    Returns:
        The parts of the parts, and their kinds.
    """
    prompt = [token for segment in segments for token in segment]
    found = places(prompt, enders, stride)
    parts: list[list[int]] = []
    names: list[str] = []
    start = 0
    for segment, kind in zip(segments, kinds, strict=True):
        stop = start + len(segment)
        cuts = [start, *(place for place in found if start < place < stop), stop]
        for begin, end in pairwise(cuts):
            parts.append(prompt[begin:end])
            names.append(kind)
        start = stop
    return parts, names
