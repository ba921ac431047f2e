"""What ranks hand each other, in processes that mlx.launch starts."""

import mlx.core as mx
import pytest

from mlx_optiq_ext import distributed

EXCHANGES = """
import mlx.core as mx
from mlx_optiq_ext import distributed
from mlx_optiq_ext.distributed import exchange

rank, size = distributed.rank(), distributed.size()
distributed.agree(config=[1, 2])
shares = distributed.gathered(distributed.share(range(7)))
assert sorted(item for part in shares for item in part) == list(range(7))
assert max(map(len, shares)) - min(map(len, shares)) <= 1
# Beyond a frame.
assert distributed.gathered("x" * 5000 * rank) == ["x" * 5000 * n for n in range(size)]
assert distributed.total(rank / 3) == sum(n / 3 for n in range(size))
assert distributed.broadcast(rank, size - 1) == size - 1
assert distributed.first(lambda: rank) == 0

large = mx.full((600, 600), float(rank))
small = [mx.full((2, 3), rank + 0.5), mx.array([rank])]
found = distributed.summed({"large": large, "small": small})
counts = size * (size - 1) // 2
assert found["large"].shape == (600, 600)
assert mx.all(found["large"] == counts)
assert found["small"][0].tolist() == [[counts + size / 2] * 3] * 2
assert found["small"][1].tolist() == [counts]

owner = size - 1
halves = mx.array([owner, -0.0, float("nan")], mx.bfloat16)
given = (halves, mx.array([[2**32 - 1 - rank]], mx.uint32))
arrived, codes = distributed.handed(given if rank == owner else (), owner)
assert arrived.dtype == mx.bfloat16 and codes.dtype == mx.uint32
assert arrived.view(mx.uint16).tolist() == halves.view(mx.uint16).tolist()
assert codes.tolist() == [[2**32 - 1 - owner]]
assert distributed.handed(mx.array(7 if rank == owner else 0), owner).item() == 7

parts = distributed.gathered(distributed.span(range(12)))
assert [item for part in parts for item in part] == list(range(12))
assert {len(part) for part in parts} == {12 // size}
parts = distributed.gathered(distributed.span("abcd", [8, 4, 2, 2]))
assert parts == ([["a"], ["b", "c", "d"]] if size == 2 else [[], ["a"], ["b"], ["c", "d"]])

exchange.PIECE = 50  # several pieces an array
own = [mx.full((5 + rank, 7), float(rank)), mx.array(rank, mx.bfloat16)][: 1 if rank == 1 else 2]
(note, before), (last_note, last) = distributed.passed(f"of {rank}", own)
assert note == (f"of {rank - 1}" if rank else None)
assert [a.shape for a in before] == [(4 + rank, 7), ()][: 0 if rank == 0 else 1 if rank == 2 else 2]
assert all(mx.all(array == rank - 1) for array in before)
assert last_note == f"of {size - 1}" and last[0].shape == (4 + size, 7)
assert mx.all(last[0] == size - 1)
assert distributed.passed(None, [])[1] == (None, [])

alone = distributed.led(lambda: (distributed.size(), distributed.gathered(rank)))
assert alone == (None if rank else (1, [0]))
print(f"rank {rank} of {size} is done")
"""


@pytest.mark.parametrize(("count", "whole"), [(2, True), (2, False), (4, False)])
def test_what_is_handed_out_arrives_on_every_rank(launch, count, whole):
    done = launch(count, "-c", EXCHANGES, whole=whole)
    assert done.stdout.count("is done") == count, done.stdout + done.stderr


def test_alone_everything_comes_back_as_it_is():
    array = mx.zeros((2, 2))
    assert distributed.size() == 1
    assert distributed.leads()
    assert distributed.share([1, 2, 3]) == [1, 2, 3]
    assert distributed.gathered(array)[0] is array
    assert distributed.summed(array) is array
    assert distributed.handed(array, 0) is array
    assert distributed.first(lambda: array) is array
    distributed.agree(anything=object())


def test_an_error_alone_is_the_same_error():
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as raised, distributed.together():
        raise error
    assert raised.value is error
    assert not distributed.told(error)
