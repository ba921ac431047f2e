"""Rows of mlx-lm's batch generator keep their adapters, whatever happens to the batch."""

import os
import random

import mlx.core as mx
import mlx_lm
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import write_exact
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from toy_adapters import write_adapter

from mlx_optiq_ext.adapters import (
    AdapterActivation,
    Mixture,
    Mounts,
    mount_adapter_on_model,
    mounts_on,
)

pytestmark = pytest.mark.skipif(
    tuple(map(int, mlx_lm.__version__.split(".")[:2])) < (0, 32),
    reason="mlx-lm before 0.32 serves adapters one at a time",
)

NAMES = (None, "A", "B", "C", "D")
#: A sum of two adapters, and half of one.
BOTH, HALF = Mixture((("A", 1.0), ("B", 1.0))), Mixture((("A", 0.5),))
LENGTH = 4
#: Requests of the long run; a few more take a while.
REQUESTS = int(os.environ.get("MLX_OPTIQ_TEST_REQUESTS", "100"))
PROMPTS = [[7 + 13 * i + j for j in range(2 + 5 * i % 9)] for i in range(8)]


@pytest.fixture(scope="module")
def served(exact, tmp_path_factory):
    """`offered` on the tiny model."""
    return offered(exact, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def larger(shared, tmp_path_factory):
    """`offered` on a larger model."""
    root = tmp_path_factory.mktemp("adapters")
    return offered(write_exact(shared / "models" / "ref-24m", root / "exact"), root)


either = pytest.mark.parametrize(
    "which", ["served", pytest.param("larger", marks=pytest.mark.shared)]
)


def offered(source, root):
    """The model with four adapters of three ranks, a plain one, and answers given alone."""
    model, plain = (mlx_lm.load(str(source))[0] for _ in range(2))
    for seed, (name, rank) in enumerate(zip(NAMES[1:], (4, 8, 4, 16), strict=True)):
        mount_adapter_on_model(
            model, name, write_adapter(root / name, plain, rank=rank, seed=seed, size=0.9)
        )
    answers = {}

    def alone(name, number):
        if (name, number) not in answers:
            tokens = mx.array([PROMPTS[number]])
            cache, said = make_prompt_cache(model), []
            with AdapterActivation(name):
                for _ in range(LENGTH):
                    tokens = mx.argmax(model(tokens, cache=cache)[:, -1:], axis=-1)
                    said.append(tokens.item())
            answers[name, number] = said
        return answers[name, number]

    return model, plain, alone


def insert(generator, name, number, **options):
    with AdapterActivation(name):
        (uid,) = generator.insert([PROMPTS[number]], max_tokens=[LENGTH], **options)
    return uid


def step(generator, said):
    """One step; the uids of finished rows."""
    finished = []
    for response in generator.next()[1]:
        said.setdefault(response.uid, []).append(response.token)
        if response.finish_reason is not None:
            finished.append(response.uid)
    return finished


def test_answers_differ_by_adapter(served):
    _, _, alone = served
    for number in range(len(PROMPTS)):
        assert len({tuple(alone(name, number)) for name in NAMES}) >= 4


@either
def test_eight_rows_of_four_adapters_and_base_answer_as_alone(which, request):
    model, _, alone = request.getfixturevalue(which)
    generator, said, asked = BatchGenerator(model), {}, {}
    for number in range(8):
        name = NAMES[number % 5]
        asked[insert(generator, name, number)] = (name, number)
    while len(said) < 8 or any(len(tokens) < LENGTH for tokens in said.values()):
        step(generator, said)
    assert said == {uid: alone(*each) for uid, each in asked.items()}


def test_rows_of_sums_answer_as_alone_beside_others(served):
    model, _, alone = served
    generator, said, asked = BatchGenerator(model), {}, {}
    for number, name in enumerate([None, "A", "B", BOTH, HALF, BOTH, "A", None]):
        asked[insert(generator, name, number)] = (name, number)
    finish(generator, asked, said)
    assert said == {uid: alone(*each) for uid, each in asked.items()}
    assert in_use(model) == 0


@either
def test_rows_on_base_are_bit_identical_to_a_server_without_adapters(which, request):
    model, plain, _ = request.getfixturevalue(which)

    def run(model, names):
        generator, logprobs = BatchGenerator(model), {}
        for number, name in enumerate(names):
            insert(generator, name, number)
        for _ in range(12):
            for response in generator.next()[1]:
                logprobs.setdefault(response.uid, []).append(response.logprobs)
        return logprobs

    expected = run(plain, [None] * 8)
    for names in (
        [None] * 8,
        [None, "A", None, "B", "D", None, "C", None],
        [None, BOTH, None, HALF, "A", None, "B", None],
    ):
        found = run(model, names)
        for uid, name in enumerate(names):
            assert len(found[uid]) == len(expected[uid]) == LENGTH
            same = mx.array_equal(mx.stack(found[uid]), mx.stack(expected[uid])).item()
            assert same is (name is None)


@given(data=st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_row_order_survives_arrivals_and_cancellations(served, data):
    model, _, alone = served
    generator = BatchGenerator(model, completion_batch_size=6, prefill_batch_size=3)
    said, asked, cancelled = {}, {}, set()
    for _ in range(data.draw(st.integers(4, 14))):
        action = data.draw(st.sampled_from(["insert", "insert", "step", "step", "cancel"]))
        if action == "insert":
            name = data.draw(st.sampled_from(NAMES))
            number = data.draw(st.integers(0, len(PROMPTS) - 1))
            asked[insert(generator, name, number)] = (name, number)
        elif action == "step":
            step(generator, said)
        elif running := sorted(uid for uid in asked if len(said.get(uid, ())) < LENGTH):
            uid = data.draw(st.sampled_from(running))
            generator.remove([uid])
            cancelled.add(uid)
            asked.pop(uid)
    finish(generator, asked, said)
    for uid, each in asked.items():
        assert said[uid] == alone(*each), each
    assert in_use(model) == 0


@either
def test_many_requests_at_random_answer_as_alone(which, request):
    model, _, alone = request.getfixturevalue(which)
    generator = BatchGenerator(model, completion_batch_size=32, prefill_batch_size=16)
    chance, said, asked, cancelled = random.Random(5), {}, {}, set()
    while len(asked) < REQUESTS:
        for _ in range(chance.randrange(14)):
            each = chance.choice(NAMES), chance.randrange(len(PROMPTS))
            asked[insert(generator, *each)] = each
        for _ in range(chance.randrange(4)):
            step(generator, said)
        running = [uid for uid in asked if len(said.get(uid, ())) < LENGTH and uid not in cancelled]
        if running and chance.random() < 0.3:
            uid = chance.choice(running)
            generator.remove([uid])
            cancelled.add(uid)
    rest = {uid: each for uid, each in asked.items() if uid not in cancelled}
    finish(generator, rest, said)
    assert len(cancelled) > 3
    wrong = [uid for uid, each in rest.items() if said[uid] != alone(*each)]
    assert wrong == []
    # What cancelled rows said until then was theirs too.
    assert all(
        said.get(uid, []) == alone(*asked[uid])[: len(said.get(uid, []))] for uid in cancelled
    )
    assert in_use(model) == 0


def finish(generator, asked, said):
    for _ in range(2000):
        if all(len(said.get(uid, ())) == LENGTH for uid in asked):
            return
        step(generator, said)
    raise AssertionError("rows never finished")


def in_use(model) -> int:
    mounts = mounts_on(model)
    assert isinstance(mounts, Mounts)
    return sum(mounts.uses(adapter) for adapter in mounts.names.values())


def test_rows_inserted_without_an_adapter_stay_base_under_an_activation(served):
    model, _, alone = served
    generator, said = BatchGenerator(model), {}
    base, other = insert(generator, None, 1), insert(generator, "B", 2)
    with AdapterActivation("A"):
        finish(generator, [base, other], said)
    assert said == {base: alone(None, 1), other: alone("B", 2)}


def test_a_generator_that_is_given_up_lets_its_adapters_go(served):
    model, *_ = served
    generator = BatchGenerator(model)
    insert(generator, "A", 0)
    assert in_use(model) == 1
    del generator
    assert in_use(model) == 0
