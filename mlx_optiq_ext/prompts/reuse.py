"""Finds the longest prefix of a prompt in a store, and keeps new prompts there."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from .._status import note
from ..errors import InputError
from . import chain, tails
from .block_file import Piece
from .space import Space
from .splitting import (
    covered,
    cut,
    exact,
    has_snapshots,
    join,
    knows,
    leaves,
    per_token,
    storable,
    whole_at,
)
from .store import BlockStore
from .writer import Writer


@dataclass(frozen=True)
class StoredPrompts:
    """The prompts in a store.

    Attributes:
        store: Where they are.
        block: Tokens of a block.
        writer: Writes what is new.
    """

    store: BlockStore
    block: int = chain.BLOCK
    writer: Writer = field(default_factory=Writer)

    def find(
        self, space: Space, tokens: Sequence[int], known: int = 0, most: int | None = None
    ) -> tuple[list[Any], int] | None:
        """Caches of a stored prefix, and its length.

        At least one token is left, because a model must be run on one.

        Args:
            space: What the prompt is computed with.
            tokens: The prompt.
            known: Tokens that the caller has already; only longer prefixes count.
            most: Tokens of the longest prefix that the caller can use; None for all but one.
        """
        most = len(tokens) - 1 if most is None else min(most, len(tokens) - 1)
        if most <= known or not chain.keyable(tokens):
            return None
        caches = space.make()
        if has_snapshots(caches):
            keys = chain.keys(space.digest, tokens[:most], self.block)
            return self._with_snapshot(space, tokens[:most], keys, caches, known)
        return self._of_blocks(space, tokens, caches, known, most)

    def keep(
        self,
        space: Space,
        tokens: Sequence[int],
        caches: Sequence[Any],
        ends: Collection[int] | None = None,
    ) -> None:
        """Write what is new of a prompt, off this thread.

        Args:
            space: What it was computed with.
            tokens: The prompt.
            caches: One row's.
            ends: Lengths of it that may be asked for again; None for the whole. What fills no
                block is kept up to the last of them. Snapshots are always kept.
        """
        length = covered(caches, len(tokens))
        if not length or not self.store.writable or not chain.keyable(tokens):
            return
        if not storable(caches):
            return
        keys = chain.keys(space.digest, tokens[:length], self.block)
        snapshots = has_snapshots(caches)
        for place, key in enumerate(keys[1:] if any(map(per_token, leaves(caches))) else ()):
            if self.writer.waits(key) or self.store.has(space.digest, key):
                continue
            start = place * self.block
            if not whole_at(caches, start + self.block):
                return
            piece = cut(key, caches, start, start + self.block)
            own = () if snapshots else tokens[start : start + self.block]
            if not self.writer.offer(piece, partial(self._write, space.digest, keys[place], own)):
                return  # what lies behind a gap is never found
        if not snapshots:
            lengths = {length} if ends is None else {min(end, length) for end in ends}
            self._keep_ends(space, tokens, keys, caches, lengths)
        elif exact(caches, length) and whole_at(caches, length):
            self._keep_snapshot(space, tokens[:length], keys, caches)

    def _write(self, space: str, parent: str, tokens: Sequence[int], piece: Piece) -> None:
        """Write a block, to which the ends refer that it holds."""
        self.store.write(space, piece)
        tails.refer(self.store, space, parent, tokens, (0, piece.key))

    def _keep_ends(
        self,
        space: Space,
        tokens: Sequence[int],
        keys: list[str],
        caches: Sequence[Any],
        ends: Collection[int],
    ) -> None:
        holder: tails.Holder | None = None
        for end in sorted(ends, reverse=True):
            place, rest = divmod(end, self.block)
            if rest < 2:  # a token is computed anyway
                continue
            if not (whole_at(caches, end) or whole_at(caches, end - 1)):
                continue
            parent, start = keys[place], end - rest
            own = tokens[start:end]
            key = chain.tail_key(parent, own)
            whole = place + 1 < len(keys)
            there = self.writer.waits(key) or self.store.has_snapshot(
                space.digest, parent, rest, key
            )
            if whole or holder is not None:
                within = (0, keys[place + 1]) if whole else holder
                assert within is not None
                piece = tails.reference(key, rest, within)
            else:
                holder = rest, key
                piece = None if there else cut(key, caches, start, end)
            if piece is not None and not there:
                self.writer.offer(piece, partial(self._write_end, space.digest, parent, own))

    def _write_end(self, space: str, parent: str, tokens: Sequence[int], piece: Piece) -> None:
        """Write an end, to which shorter ones refer if it holds them."""
        self.store.write_snapshot(space, parent, len(tokens), piece)
        if piece.arrays:
            tails.refer(self.store, space, parent, tokens, (len(tokens), piece.key))

    def _keep_snapshot(
        self, space: Space, tokens: Sequence[int], keys: list[str], caches: Sequence[Any]
    ) -> None:
        start, parent = (len(keys) - 1) * self.block, keys[-1]
        rest = len(tokens) - start
        key = chain.tail_key(parent, tokens[start:])
        if self.writer.waits(key) or self.store.has_snapshot(space.digest, parent, rest, key):
            return
        piece = cut(key, caches, start, len(tokens), snapshot=True)
        self.writer.offer(
            piece, lambda each: self.store.write_snapshot(space.digest, parent, rest, each)
        )

    def _of_blocks(
        self, space: Space, tokens: Sequence[int], caches: list[Any], known: int, most: int
    ) -> tuple[list[Any], int] | None:
        needed = -(-most // self.block)  # of the last one a part may be enough
        keys = chain.keys(space.digest, tokens, self.block)[: needed + 1]
        there = self._there(space, keys)
        while True:
            start, parent = there * self.block, keys[there]
            ends = tails.matching(self.store, space.digest, parent, tokens[start:])
            if min(start + max((rest for rest, _ in ends), default=0), most) <= known:
                return None
            pieces = self._blocks(space, keys[: there + 1], known)
            if len(pieces) == there:
                break
            there = len(pieces)
        used, held = keys[1 : there + 1], []
        for end in ends if start < most else ():
            found = tails.read(self.store, space.digest, parent, end)
            if found is not None:
                piece, (rest, key) = found
                if not knows(caches, [*pieces, piece], min(start + end[0], most)):
                    continue
                pieces.append(piece)
                start += end[0]
                held = [(parent, *end), *([(parent, rest, key)] if rest else [])]
                used += [] if rest else [key]
                break
        length = min(start, most)
        if length <= known or not _joined(caches, pieces, length):
            return None
        self.store.used(space.digest, used, held)
        return caches, length

    def _with_snapshot(
        self, space: Space, tokens: Sequence[int], keys: list[str], caches: list[Any], known: int
    ) -> tuple[list[Any], int] | None:
        blocks = any(map(per_token, leaves(caches)))
        for place in range(len(keys) - 1, -1, -1):
            start, parent = place * self.block, keys[place]
            if start + self.block <= known:
                return None
            for rest, key in self.store.snapshots(space.digest, parent):
                length = start + rest
                if not known < length <= len(tokens):
                    continue
                if chain.tail_key(parent, tokens[start:length]) != key:
                    continue
                used = keys[: place + 1] if blocks else keys[:1]
                pieces = self._blocks(space, used, known)
                last = self.store.snapshot(space.digest, parent, rest, key)
                if last is None or len(pieces) < len(used) - 1:
                    continue
                if not blocks:
                    last = replace(last, notes={**last.notes, "tokens": length})
                if _joined(caches, [*pieces, last], length):
                    self.store.used(space.digest, used[1:], [(parent, rest, key)])
                    return caches, length
                caches = space.make()
        return None

    def _blocks(self, space: Space, keys: list[str], known: int) -> list[Any]:
        """The blocks behind the first key, up to the first that is absent; none if too short."""
        there = self._there(space, keys)
        found: list[Any] = []
        if there * self.block + self.block <= known:
            return found
        for key in keys[1 : there + 1]:
            piece = self.store.block(space.digest, key)
            if piece is None:
                break
            found.append(piece)
        return found

    def _there(self, space: Space, keys: list[str]) -> int:
        """How many blocks behind the first key have files."""
        there = 0
        while there < len(keys) - 1 and self.store.has(space.digest, keys[there + 1]):
            there += 1
        return there


def _joined(caches: list[Any], pieces: list[Any], length: int) -> bool:
    try:
        join(caches, pieces, length)
    except (AttributeError, IndexError, InputError, KeyError, TypeError, ValueError) as error:
        note("a stored prompt does not fit this model and is computed again", error)
        return False
    return True
