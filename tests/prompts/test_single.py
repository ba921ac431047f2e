"""Prompts that are computed alone: by commands, and by the server for requests with a seed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import toy_models
from live_server import Server, serve
from mlx_lm.generate import generate_step
from mlx_lm.utils import save_model

from mlx_optiq_ext import prompts

from .conftest import ENDER, Toy, stored, toy

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}assistant (thinks): {% endif %}"
)
#: Tokens that a model is made to compute at a time, fewer than any prompt's.
STEP = 16


def answered(own: Toy, sequences: prompts.Sequences | None, prompt: list[int]) -> list[int]:
    """Greedy tokens, as a command computes them; `Toy.seen` counts those of prompts."""
    caches = own.make()

    def generate(rest: list[int]) -> Iterator[tuple[int, Any]]:
        own.seen += len(rest)
        found: Any = generate_step(
            mx.array(rest), own.model, prompt_cache=caches, prefill_step_size=STEP, max_tokens=4
        )
        return found

    def model(tokens: mx.array, **kwargs: Any) -> Any:
        own.seen += tokens.size
        return own.model(tokens, **kwargs)

    if sequences is None:
        return [token for token, _ in generate(prompt)]
    run = sequences.run(own.space, prompt, caches, generate, model, STEP)
    return [token for token, _ in run]


@pytest.mark.parametrize("spec", ["16", "4g32"])
@pytest.mark.parametrize("family", ["qwen3_5", "gemma3_text"])
def test_a_command_goes_on_behind_the_message_before(family, spec, tmp_path):
    own = toy(family, spec)
    start = [*((7 * i) % 28 + 1 for i in range(40)), ENDER]
    asked = [[*start, *range(1, count), 41, 42] for count in (9, 20, 14)]
    counts = []
    for prompt in [*asked, *asked]:
        at = stored(tmp_path)
        sequences = prompts.Sequences(at)
        sequences.enders = [ENDER]
        expected, own.seen = answered(own, None, prompt), 0
        assert answered(own, sequences, prompt) == expected
        assert at.writer.flush()
        counts.append(own.seen)
    first, *others = (len(prompt) for prompt in asked)
    assert counts == [first, *(length - len(start) for length in others), 1, 1, 1]


@pytest.fixture(scope="module")
def hybrid(tiny, tmp_path_factory) -> Path:
    """A served model with layers of linear attention."""
    folder = tmp_path_factory.mktemp("models") / "hybrid"
    settings = toy_models.config("qwen3_5")
    settings["text_config"]["vocab_size"] = json.loads((tiny / "config.json").read_text())[
        "vocab_size"
    ]
    settings["eos_token_id"] = 0
    save_model(folder, toy_models.build("qwen3_5", settings))
    (folder / "config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def told(server: Server, messages: list[str], **options: Any) -> tuple[str, int, int]:
    """The greedy answer, the prompt's tokens, and those that were not computed."""
    roles = ("user", "assistant")
    said: list[Any] = [{"role": roles[i % 2], "content": each} for i, each in enumerate(messages)]
    done = server.client().chat.completions.create(
        model="default_model",
        messages=said,
        temperature=0,
        max_tokens=6,
        seed=1,  # such requests are not batched
        **options,
    )
    assert done.usage is not None
    assert done.usage.prompt_tokens_details is not None
    cached = done.usage.prompt_tokens_details.cached_tokens or 0
    return done.choices[0].message.content or "", done.usage.prompt_tokens, cached


def test_the_server_goes_on_behind_the_message_before(hybrid, tmp_path):
    words = [
        "How many bricks are in the bag?",
        "There are three.",
        "Why?",
        "Who knows.",
        "And now?",
    ]
    turns = [words[:count] for count in (1, 3, 5)]
    turns.append([*words[:4], "No, tell me how many!"])
    with serve(tmp_path / "plain", "--model", hybrid) as server:
        stock = [told(server, turn) for turn in turns]
    own = ("--model", hybrid, "--optiq-prompt-cache", tmp_path / "prompts")
    with serve(tmp_path / "log", *own) as server:
        ours = [told(server, turn) for turn in turns]
        again = told(server, turns[-1])
    assert [text for text, *_ in ours] == [text for text, *_ in stock]
    assert [cached for *_, cached in stock] == [0] * 4
    _, second, third, edited = (cached for *_, cached in ours)
    assert 0 < second < third < edited
    assert again[2] == again[1] - 1
