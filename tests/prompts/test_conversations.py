"""Random conversations answer with a prompt cache as they do without one."""

import copy
import tempfile
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_optiq_ext.prompts import block_file, chain
from mlx_optiq_ext.prompts.block_file import Piece

from .conftest import ENDER, Toy, states, stored, tiered, toy

TOKEN = st.integers(1, 28)
MESSAGE = st.lists(TOKEN, min_size=1, max_size=14).map(lambda tokens: [*tokens, ENDER])
#: What a client does next: a turn, an answer again, an edited last turn, other conversations (one,
#: or two at once), a restart.
STEP = st.one_of(
    st.tuples(st.just("turn"), MESSAGE),
    st.tuples(st.just("again"), st.just([1])),
    st.tuples(st.just("edit"), MESSAGE),
    st.tuples(st.just("branch"), MESSAGE),
    st.tuples(st.just("two"), MESSAGE),
    st.tuples(st.just("restart"), st.just([1])),
)


# 306 of them, 34 of each model and plan, with --hypothesis-profile thorough.
@settings(
    max_examples=max(8, settings().max_examples // 29),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(system=st.lists(TOKEN, min_size=3, max_size=12), steps=st.lists(STEP, max_size=7))
def test_a_conversation_answers_as_without_a_cache(own: Toy, system, steps):
    with tempfile.TemporaryDirectory() as folder:
        at = stored(Path(folder))
        cache, history, last = tiered(own, at), list(system), list(system)
        for what, message in steps:
            if what == "restart":
                assert at.writer.flush()
                at = stored(Path(folder))
                cache = tiered(own, at)
                continue
            if what == "turn":
                last = [*history, *message]
            elif what == "edit":
                last = [*last[: max(1, len(last) - 2)], *message]
            elif what in ("branch", "two"):
                last = [*system, *message]
            asked = [[*last, 5, *message], last] if what == "two" else [last]
            *_, answer = answers = own.answers(asked, 3, cache)
            assert answers == [own.answer(each, 3) for each in asked]
            history = [*last, *answer]
        assert at.writer.flush()


def test_what_was_saved_comes_back_bit_for_bit(own, tmp_path):
    at, tokens = stored(tmp_path), [(7 * i) % 29 for i in range(42)]
    caches = own.space.make()
    mx.eval(own.model(mx.array([tokens]), cache=caches))
    at.keep(own.space, tokens, caches)
    assert at.writer.flush()
    found = stored(tmp_path).find(own.space, [*tokens, 1])
    assert found is not None
    again, length = found
    assert length >= 40
    saved, restored = states(caches, length), states(again, length)
    assert len(saved) == len(restored) > 0
    for one, other in zip(saved, restored, strict=True):
        if isinstance(one, mx.array):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert bool(mx.array_equal(one, other))
        else:
            assert one == other


def test_long_conversations_compute_only_what_is_new(own, tmp_path):
    at = stored(tmp_path)
    history, new = [3], []
    for turn in range(20):
        if turn % 5 == 0:  # a restart
            assert at.writer.flush()
            at = stored(tmp_path)
            cache = tiered(own, at)
        message = [(turn + i) % 28 + 1 for i in range(6)]
        before = own.seen
        answer = own.answer([*history, *message], 2, cache)
        new.append(own.seen - before - len(message))
        history += [*message, *answer]
    assert at.writer.flush()
    assert max(new) <= at.block  # what lies behind the last whole block


def test_nothing_is_shared_with_another_plan_model_or_adapter(tmp_path):
    one, other = toy("qwen3", "8g32"), toy("qwen3", "6g32")
    from mlx_optiq_ext import prompts

    spaces = [
        one.space,
        other.space,
        prompts.space_of(one.make, "another"),
        prompts.space_of(one.make, one.name, [("digest", 1.0)]),
        prompts.space_of(one.make, one.name, [("digest", 2.0)]),
    ]
    assert len({each.digest for each in spaces}) == len(spaces)
    at, tokens = stored(tmp_path), list(range(1, 22))
    caches = one.space.make()
    mx.eval(one.model(mx.array([tokens]), cache=caches))
    at.keep(one.space, tokens, caches)
    assert at.writer.flush()
    assert [at.find(each, tokens) is not None for each in spaces] == [True] + [False] * 4


def test_ten_prompts_behind_one_store_it_once(tmp_path):
    own, at = toy("qwen3"), stored(tmp_path)
    cache = tiered(own, at)
    system = [(5 * i) % 29 for i in range(80)]
    for number in range(10):
        own.answer([*system, number + 1, 2], 2, cache)
        assert at.writer.flush()
    assert len(holding(tmp_path)) == 80 // 4 + 10


@pytest.mark.parametrize("spec", ["16", "4g32"])
def test_the_same_prompt_computes_one_token_after_a_restart(tmp_path, spec):
    own = toy("qwen3", spec)
    for length in range(2, 14):
        at, prompt = stored(tmp_path / str(length)), [(5 * i) % 29 for i in range(length)]
        cache = tiered(own, at)
        answers = [own.answer(prompt, count, cache) for count in (1, 3, 6)]
        longer = own.answer([*prompt, *answers[0], 7], 4, cache)
        assert at.writer.flush()
        again = tiered(own, stored(tmp_path / str(length)))
        own.seen = 0
        assert [own.answer(prompt, count, again) for count in (1, 3, 6)] == answers
        assert own.answer([*prompt, *answers[0], 7], 4, again) == longer
        assert own.seen == 4


def test_a_conversation_is_stored_once(tmp_path):
    own, at = toy("qwen3"), stored(tmp_path, block=16)
    cache, history = tiered(own, at), [3, 5]
    for turn in range(12):
        history.append(turn + 1)
        history += own.answer(history, 3 + turn % 5, cache)
        assert at.writer.flush()
        held = sum(block_file.read(path, _key(path)).notes["tokens"] for path in holding(tmp_path))
        assert len(history) - held in (0, 1)  # one token alone is computed anyway


def test_an_end_whose_holder_is_gone_is_forgotten(tmp_path):
    own, at, prompt = toy("qwen3"), stored(tmp_path), [(5 * i) % 29 for i in range(11)]
    answer = own.answer(prompt, 4, tiered(own, at))
    assert at.writer.flush()
    third = chain.keys(own.space.digest, [*prompt, *answer], at.block)[3]
    next(tmp_path.rglob(f"{third}.safetensors")).unlink()
    for computed in (3, 1):
        own.seen, again = 0, stored(tmp_path)
        assert own.answer(prompt, 4, tiered(own, again)) == answer
        assert again.writer.flush()
        assert own.seen == computed


def test_what_waits_to_be_written_stays_as_it_was(own, tmp_path):
    at, tokens = stored(tmp_path), [(7 * i) % 29 for i in range(42)]
    caches = own.space.make()
    mx.eval(own.model(mx.array([tokens]), cache=caches))
    expected = states(copy.deepcopy(caches), 40)
    gate = threading.Event()
    at.writer.offer(Piece("first", {}), lambda piece: _wait(gate))
    at.keep(own.space, tokens, caches)
    for token in range(8):  # the caller goes on, in place
        mx.eval(own.model(mx.array([[token]]), cache=caches))
        mx.eval([cache.state for cache in caches])
    gate.set()
    assert at.writer.flush()
    found = stored(tmp_path).find(own.space, [*tokens, 1])
    assert found is not None
    for one, other in zip(expected, states(found[0], 40), strict=True):
        same = mx.array_equal(one, other) if isinstance(one, mx.array) else one == other
        assert bool(same)


def _wait(gate: threading.Event) -> None:
    assert gate.wait(10)


def holding(folder: Path) -> list[Path]:
    """The files that hold keys and values, and do not refer to others."""
    files = folder.rglob("*.safetensors")
    return [path for path in files if block_file.read(path, _key(path)).arrays]


def _key(path: Path) -> str:
    return path.stem.rpartition("-")[2]
