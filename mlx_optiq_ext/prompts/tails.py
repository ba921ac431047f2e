"""Ends of prompts that fill no block, of models whose layers all store one position per token.

Each is a file behind the last whole block. It holds keys and values, or it refers to a piece that
holds them among others: a longer end, or the block once one is filled. So the same prompt is found
again whatever was generated behind it, and nothing is stored twice.
"""

from collections.abc import Sequence

from . import chain
from .block_file import Piece
from .store import BlockStore

#: Rest and key of an end, or 0 and the key of a block.
Holder = tuple[int, str]

#: What an end may refer to by way of others, which were replaced meanwhile.
_HOPS = 4


def matching(
    store: BlockStore, space: str, parent: str, tokens: Sequence[int]
) -> list[tuple[int, str]]:
    """Tokens and key of each end behind a block with which these tokens begin, longest first."""
    found = store.snapshots(space, parent)
    fit = [each for each in found if 0 < each[0] <= len(tokens)]
    return [(rest, key) for rest, key in fit if chain.tail_key(parent, tokens[:rest]) == key]


def reference(key: str, tokens: int, holder: Holder) -> Piece:
    """An end that another piece holds."""
    return Piece(key, {}, {"tokens": tokens, "in": list(holder)})


def read(store: BlockStore, space: str, parent: str, end: Holder) -> tuple[Piece, Holder] | None:
    """The piece that holds an end, among others, and which it is; None if it is gone."""
    holder = end
    for _ in range(_HOPS):
        rest, key = holder
        piece = store.snapshot(space, parent, rest, key) if rest else store.block(space, key)
        if piece is None:
            break
        if "in" not in piece.notes:
            return piece, holder
        match piece.notes["in"]:
            case [int(rest), str(key)] if rest >= 0 and len(key) == chain.LENGTH and key.isalnum():
                holder = rest, key
            case _:
                break
    store.drop_snapshot(space, parent, *end)
    return None


def refer(
    store: BlockStore, space: str, parent: str, tokens: Sequence[int], holder: Holder
) -> None:
    """Have the ends behind a block refer to a piece that holds these tokens."""
    for rest, key in matching(store, space, parent, tokens):
        if (rest, key) != holder:
            store.write_snapshot(space, parent, rest, reference(key, rest, holder), replace=True)
