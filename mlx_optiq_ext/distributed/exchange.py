"""Data exchanged between ranks.

Each exchange starts with a header of fixed size. So a rank that failed can tell the others at any
exchange, and a rank that runs something else is detected.
"""

import hashlib
import math
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import accumulate
from typing import Any, NoReturn, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from .failure import Failed, RankError, named
from .watch import LIMIT, explain_termination, guarded, within

T = TypeVar("T")

#: A note and arrays.
Sent = tuple[Any, list[mx.array]]

#: Starts every header; its number is raised when the format changes.
MARK = 0x6F7074697101
#: Kinds of exchange.
GATHER, SUM, FAILED = range(3)
#: Bytes of the first message of an exchange, and of its header.
FRAME, HEAD = 1024, 24
#: Bytes up to which arrays are summed together: each sum waits for all ranks.
JOINED = 2**20
#: Bytes of each rank that are sent at once.
PIECE = 2**26

REMEDY = (
    "every host must run the same command with the same mlx-optiq-ext, and reach the others under "
    "the addresses of mlx.launch's hostfile"
)


@cache
def group(limit: float = LIMIT) -> mx.distributed.Group:
    """All processes of this run; one alone if ``mlx.launch`` did not start them.

    Raises:
        RankError: MLX cannot reach the others. If they do not answer, this process ends instead.
    """
    text = f"the other ranks did not start within {limit:.0f} s: {REMEDY}"
    # Every backend of mlx.launch but MPI sets one of these variables.
    waits = guarded(limit, text) if "MLX_RANK" in os.environ else nullcontext()
    with waits:
        try:
            found = mx.distributed.init()
        except RuntimeError as error:
            raise RankError(f"MLX could not reach the other ranks ({error}): {REMEDY}") from error
    if found.size() > 1:
        explain_termination(f"rank {found.rank()} was ended, because another rank failed")
    return found


#: One entry for each `alone` that this process is in.
_alone: list[None] = []


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works by itself: it is rank 0 of one."""
    _alone.append(None)
    try:
        yield
    finally:
        _alone.pop()


def size() -> int:
    """How many processes work together."""
    return 1 if _alone else group().size()


def rank() -> int:
    """Number of this process, from 0."""
    return 0 if _alone else group().rank()


def leads() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def gathered(value: T) -> list[T]:
    """The values of all processes, which can be pickled, by rank."""
    if size() == 1:
        return [value]
    return [pickle.loads(part) for part in _exchanged(GATHER, pickle.dumps(value))]


def total(value: float) -> float:
    """The sum over all processes, in double precision and the same in each."""
    return sum(gathered(value))


def broadcast(value: T, owner: int = 0) -> T:
    """The owner's value, which can be pickled, in every process."""
    values: list[Any] = gathered(value if rank() == owner else None)
    return values[owner]


def first(compute: Callable[[], T]) -> T:
    """Compute a value, which can be pickled, on rank 0 and return it in every process."""
    found: Any = compute() if leads() else None
    return broadcast(found)


def summed(tree: T) -> T:
    """A tree of arrays summed over all processes, whose trees have the same shapes."""
    if size() == 1:
        return tree
    leaves = _flat(tree)
    shapes = pickle.dumps([(path, a.shape, str(a.dtype)) for path, a in leaves])
    if len(set(_exchanged(SUM, hashlib.sha256(shapes).digest()))) > 1:
        raise RankError("the ranks sum different arrays: please report this")
    sums = {path: _all_sum(array) for path, array in leaves if array.nbytes > JOINED}
    small: dict[mx.Dtype, list[tuple[str, mx.array]]] = {}
    for path, array in leaves:
        if path not in sums:
            small.setdefault(array.dtype, []).append((path, array))
    for entries in small.values():
        flat = _all_sum(mx.concatenate([array.reshape(-1) for _, array in entries]))
        ends = list(accumulate(array.size for _, array in entries))[:-1]
        parts = mx.split(flat, ends)
        sums |= {path: p.reshape(a.shape) for (path, a), p in zip(entries, parts, strict=True)}
    return tree_map_with_path(lambda path, _: sums[path], tree)


def handed(tree: T, owner: int) -> T:
    """The owner's tree of arrays in every process, bit for bit; the others' is not used."""
    if size() == 1:
        return tree
    given = _flat(tree) if rank() == owner else []
    own = dict(given)
    found = []
    for path, shape, name in broadcast([(p, a.shape, str(a.dtype)) for p, a in given], owner):
        dtype = getattr(mx, name.removeprefix("mlx.core."))
        array = own.get(path, mx.zeros(shape, dtype))
        octets = _all_sum(mx.contiguous(array).reshape(-1).view(mx.uint8))
        found.append((path, octets.view(dtype).reshape(shape)))
    return found[0][1] if found[0][0] == "" else tree_unflatten(found)


def passed(note: Any, given: Sequence[mx.array]) -> tuple[Sent, Sent]:
    """Send data to the next rank, and the last rank's data to all.

    Args:
        note: A value that can be pickled.
        given: Arrays, not empty.

    Returns:
        Note and arrays of the rank before (of rank 0: None and none), and those of the last rank.
    """
    if size() == 1:
        return (None, []), (note, list(given))
    layouts = gathered((note, [(a.shape, str(a.dtype).removeprefix("mlx.core.")) for a in given]))
    before, last = rank() - 1, size() - 1
    arrived: dict[int, list[mx.array]] = {before: [], last: []}
    for position in range(max(len(layout) for _, layout in layouts)):
        ranked = [layout[position] if position < len(layout) else None for _, layout in layouts]
        lengths = [_octets(*entry) if entry else 0 for entry in ranked]
        own = given[position] if position < len(given) else None
        for number, octets in _pieces(own, lengths, [n for n in arrived if n >= 0]).items():
            if (entry := ranked[number]) is not None:
                shape, name = entry
                arrived[number].append(octets.view(getattr(mx, name)).reshape(shape))
    note_before = layouts[before][0] if before >= 0 else None
    return (note_before, arrived[before]), (layouts[last][0], arrived[last])


def _octets(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * getattr(mx, dtype).size


def _pieces(own: mx.array | None, lengths: list[int], wanted: list[int]) -> dict[int, mx.array]:
    """The bytes of some ranks' arrays, uint8, in pieces; all ranks take part."""
    octets = mx.zeros(0, mx.uint8)
    if own is not None:
        octets = mx.contiguous(own).reshape(-1).view(mx.uint8)
    parts: dict[int, list[mx.array]] = {number: [octets[:0]] for number in wanted}
    for start in range(0, max(lengths), PIECE):
        length = min(PIECE, max(lengths) - start)
        piece = octets[start : start + length]
        row = mx.pad(piece, (0, length - piece.size))[None]
        rows = _evaluated(mx.distributed.all_gather(row, group=group(), stream=mx.cpu))
        for number, kept in parts.items():
            kept.append(mx.contiguous(rows[number, : max(lengths[number] - start, 0)]))
        mx.eval(parts)
    return {number: mx.concatenate(kept) for number, kept in parts.items()}


def announce(message: str) -> NoReturn:
    """Tell the other processes, at their next exchange, that this one failed.

    Raises:
        Failed: In all processes, with the messages of all that failed.
    """
    with within(LIMIT, lambda: message):
        _exchanged(FAILED, message.encode())
    raise AssertionError("an exchange that announces a failure always raises")


def _exchanged(kind: int, data: bytes) -> list[bytes]:
    """Each process's data, in an exchange of the same kind.

    Raises:
        RankError: Another rank failed, is gone, or runs something else.
    """
    rows = _all_gather(_frame(kind, data))
    heads = rows[:, :HEAD].view(np.int64)
    others = [number for number, head in enumerate(heads) if head[0] != MARK]
    if others:
        raise RankError(f"{named(others)} runs something else than rank {rank()}: {REMEDY}")
    kinds, lengths = heads[:, 1], heads[:, 2].tolist()
    if max(lengths) > FRAME - HEAD:
        padded = np.zeros((1, max(lengths)), np.uint8)
        padded[0, : len(data)] = np.frombuffer(data, np.uint8)
        rows = _all_gather(padded)
    else:
        rows = rows[:, HEAD:]
    parts = [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]
    if FAILED in kinds:
        texts = zip(kinds, parts, strict=True)
        raise Failed([part.decode() if own == FAILED else "" for own, part in texts])
    if len(set(kinds)) > 1:
        raise RankError("the ranks are not at the same step: please report this")
    return parts


def _frame(kind: int, data: bytes) -> np.ndarray:
    """The header, and the data if it is short: one exchange is then enough, (1, FRAME)."""
    frame = np.zeros((1, FRAME), np.uint8)
    frame[0, :HEAD] = np.array([MARK, kind, len(data)], np.int64).view(np.uint8)
    if len(data) <= FRAME - HEAD:
        frame[0, HEAD : HEAD + len(data)] = np.frombuffer(data, np.uint8)
    return frame


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    leaves = tree_flatten(tree)
    assert isinstance(leaves, list)
    return leaves


def _all_gather(row: np.ndarray) -> np.ndarray:
    gather = mx.distributed.all_gather(mx.array(row), group=group(), stream=mx.cpu)
    return np.array(_evaluated(gather))


def _all_sum(array: mx.array) -> mx.array:
    return _evaluated(mx.distributed.all_sum(array, group=group(), stream=mx.cpu))


def _evaluated(array: mx.array) -> mx.array:
    try:
        mx.eval(array)
    except RuntimeError as error:
        raise RankError(
            f"rank {rank()} lost another rank ({error}): what that one printed last says why"
        ) from error
    return array
