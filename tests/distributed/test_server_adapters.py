"""A live stock server on several ranks, whose requests pick adapters."""

import random
from concurrent.futures import ThreadPoolExecutor

import mlx_lm
import openai
import pytest
from toy_adapters import write_everywhere

from mlx_optiq_ext.adapters import AdapterActivation, mount_adapter_on_model

from .conftest import needs_split_server
from .live_ranks import serve_ranks

pytestmark = needs_split_server

NAMES = ("red", "green", "blue", "grey")
QUESTIONS = (
    "There are 13 bricks in each bag and Noah buys 2 bags. How many bricks are there?",
    "Ivan has 25 stamps. Ana has twice as many. How many stamps do they have?",
    "Mia has 31 apples and gives 12 to Tom. How many apples does Mia have left?",
    "A box holds 4 rows of 6 eggs. How many eggs are in 3 boxes?",
)
COUNT = 8


def write(folder, model):
    """Adapters by name, of different ranks."""
    whole = mlx_lm.utils.load_model(model)[0]
    return {
        name: write_everywhere(
            folder / name, whole, rank=rank, seed=rank, size=0.15, inside=".layers."
        )
        for rank, name in enumerate(NAMES, 3)
    }


def alone(model, adapters):
    """What one process answers with one adapter, or with none: by adapter and question."""
    answers = {}
    for name, folder in {None: None, **adapters}.items():
        loaded, tokenizer = mlx_lm.load(str(model), adapter_path=folder and str(folder))[:2]
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            answers[name, question] = mlx_lm.generate(loaded, tokenizer, prompt, max_tokens=COUNT)
    assert len(set(answers.values())) > len(answers) // 2
    return answers


def added(model, adapters, names):
    """What one process answers with a sum of adapters to the first question."""
    loaded, tokenizer = mlx_lm.load(str(model))[:2]
    for name in names:
        mount_adapter_on_model(loaded, name, adapters[name])
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    with AdapterActivation(dict.fromkeys(names, 1.0)):
        return mlx_lm.generate(loaded, tokenizer, prompt, max_tokens=COUNT)


def ask(server, name, question):
    done = server.client().chat.completions.create(
        model=name or "default_model",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=COUNT,
    )
    return done.choices[0].message.content or ""


@pytest.mark.parametrize(
    ("count", "how", "requests"),
    [
        (2, "tensor", 100),
        (2, "pipeline", 40),
        pytest.param(4, "tensor", 40, marks=pytest.mark.newest),
    ],
)
def test_mixed_requests_get_what_their_adapter_gives_alone(
    exact, stages, tmp_path, count, how, requests
):
    model = exact if (count, how) == (2, "tensor") else stages
    adapters = write(tmp_path / "adapters", model)
    expected = alone(model, adapters)
    words = [f"--optiq-adapter={name}={folder}" for name, folder in adapters.items()]
    words += ["--pipeline"] if how == "pipeline" else []
    asked = list(expected) * (requests // len(expected))
    random.Random(1).shuffle(asked)
    (tmp_path / "ranks").mkdir()
    with serve_ranks(count, tmp_path / "ranks", "--model", model, *words) as server:
        with ThreadPoolExecutor(8) as pool:
            given = list(pool.map(lambda each: ask(server, *each), asked))
        assert [a for a, each in zip(given, asked, strict=True) if a != expected[each]] == []
        with pytest.raises(openai.NotFoundError):
            ask(server, "nobody", QUESTIONS[0])
        # A sum of two adapters is the same on all ranks, in either order and beside others.
        sums = ["red+blue", "blue+red", "red", None] * 3
        with ThreadPoolExecutor(8) as pool:
            given = list(pool.map(lambda name: ask(server, name, QUESTIONS[0]), sums))
        assert given[:4] * 3 == given
        assert given[0] == given[1] == added(model, adapters, ("red", "blue"))
        assert given[2:4] == [expected["red", QUESTIONS[0]], expected[None, QUESTIONS[0]]]
