"""A live stock server under a per-layer plan, asked by the real OpenAI client."""

import json
from concurrent.futures import ThreadPoolExecutor

import mlx_lm
import pytest

from .conftest import PROBLEMS, held, planned, serve

BATCHED = tuple(map(int, mlx_lm.__version__.split(".")[:2])) >= (0, 32)


def test_sixteen_clients_get_what_each_would_get_alone(serving):
    questions = [PROBLEMS[i % len(PROBLEMS)] + "\n" * (i // 3) for i in range(16)]
    alone = [serving.ask(question) for question in questions]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(serving.ask, questions))
    assert together == alone
    assert alone[0].strip().endswith("#### 38")


@pytest.mark.skipif(not BATCHED, reason="mlx-lm before 0.32 serves packed caches one at a time")
def test_each_layer_holds_its_own_bits_in_the_batch(serving, kv_config):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(serving.ask, [PROBLEMS[0] + "\n" * i for i in range(8)]))
    notes = serving.log.parent / "notes.jsonl"
    assert held(notes, rows=2) == planned(kv_config)


def test_streaming_and_prompt_cache_reuse(serving):
    client = serving.client()
    messages = [{"role": "user", "content": PROBLEMS[1]}]
    options = {"model": "default_model", "temperature": 0, "max_tokens": 40}
    first = client.chat.completions.create(messages=messages, **options)
    chunks = client.chat.completions.create(messages=messages, stream=True, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == first.choices[0].message.content
    more = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": "Why?"}]
    again = client.chat.completions.create(messages=more, **options)
    assert again.choices[0].message.content
    if BATCHED:  # older servers do not report it
        assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_a_draft_model_keeps_its_own_caches(exact, kv_config, tmp_path):
    arguments = ("--model", exact, "--optiq-kv", kv_config)
    with serve(tmp_path / "plain", *arguments) as plain:
        expected = plain.ask(PROBLEMS[0])
    with serve(tmp_path / "draft", *arguments, "--draft-model", exact) as drafted:
        assert drafted.ask(PROBLEMS[0]) == expected


def test_a_plan_that_the_model_cannot_take_ends_the_server_at_start(tiny, tmp_path, run):
    plan = tmp_path / "kv.json"
    plan.write_text(json.dumps([{"layer_idx": 0, "bits": 4, "group_size": 128}]))
    done = run("mlx_lm.server", "--model", tiny, "--optiq-kv", plan, "--port", "0")
    assert done.returncode == 2
    assert "do not divide into groups of 128" in done.stderr
    assert "Traceback" not in done.stderr
