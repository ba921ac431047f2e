"""A live stock server on several ranks under a KV plan, asked by the real OpenAI client."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from live_server import serve

from .conftest import VERSION, needs_split_server
from .live_ranks import serve_ranks

pytestmark = needs_split_server

QUESTIONS = (
    "There are 13 bricks in each bag and Noah buys 2 bags. How many bricks are there?",
    "Ivan has 25 stamps. Ana has twice as many. How many stamps do they have?",
    "Mia has 31 apples and gives 12 apples to Tom. How many apples does Mia have left?",
)


def asked(server) -> list[str]:
    """Answers to requests that come together, and to a conversation that goes on."""
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(server.ask, QUESTIONS))
    messages = [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    options = {"model": "default_model", "temperature": 0, "max_tokens": 20}
    more = server.client().chat.completions.create(messages=messages, **options)
    again = server.client().chat.completions.create(messages=messages, **options)
    if VERSION >= (0, 32):  # older servers do not report it
        assert again.usage.prompt_tokens_details.cached_tokens > 0
    return [*answers, more.choices[0].message.content, again.choices[0].message.content]


@pytest.mark.parametrize("how", ["tensor", "pipeline"])
def test_two_ranks_answer_as_one_process(exact, stages, mixed, tmp_path, how):
    model, words = (exact, ()) if how == "tensor" else (stages, ("--pipeline",))
    arguments = ("--model", model, "--optiq-kv", mixed)
    with serve(tmp_path / "log", *arguments) as server:
        expected = asked(server)
    folder = tmp_path / "ranks"
    folder.mkdir()
    with serve_ranks(2, folder, *arguments, *words) as server:
        assert asked(server) == expected
