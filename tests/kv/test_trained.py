"""Trained models answer under packed caches as they do under plain ones, alone and in a batch."""

import importlib
import importlib.util
import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from greedy_tokens import alone, prompts_of, together

from mlx_optiq_ext import kv

from .conftest import PROBLEMS

FAMILIES = ("hybrid", "mla", "shared_kv", "sinks", "sliding")
BATCHED = hasattr(importlib.import_module("mlx_lm.models.cache").KVCache, "keys_and_values")


def answers(folder: Path, spec: str):
    """Tokens under the plain cache, under a plan, and under it in one batch."""
    model, tokenizer = mlx_lm.load(str(folder))[:2]
    model.set_dtype(mx.float32)
    questions = [{"question": question} for question in PROBLEMS]
    prompts = prompts_of(tokenizer, questions, plain=False)
    plain = alone(model, tokenizer, prompts, 24)
    plan = kv.parse_spec(spec)
    assert plan is not None
    kv.mount(model, plan, mergeable=BATCHED)
    packed = alone(model, tokenizer, prompts, 24)
    return plain, packed, together(model, tokenizer, prompts, 24) if BATCHED else packed


def test_the_tiny_model_says_the_same_at_eight_and_four_bits(tiny):
    for spec in ("8", "4"):
        plain, packed, batch = answers(tiny, spec)
        assert packed == plain
        assert batch == packed


@pytest.mark.skipif(not BATCHED, reason="mlx-lm before 0.32 serves packed caches one at a time")
def test_prompts_of_one_token_and_of_hundreds_share_a_batch(tiny):
    model, tokenizer = mlx_lm.load(str(tiny))[:2]
    model.set_dtype(mx.float32)
    tokens = tokenizer.encode(" ".join(PROBLEMS * 4))
    prompts = [tokens[:1], tokens[:3], tokens[5:205], tokens[7:12], tokens[9:60]]
    plan = kv.parse_spec("3")
    assert plan is not None
    kv.mount(model, plan)
    expected = alone(model, tokenizer, prompts, 10)
    assert together(model, tokenizer, prompts, 10) == expected


@pytest.mark.shared
@pytest.mark.parametrize("name", FAMILIES)
def test_each_kind_of_attention_says_the_same_at_eight_bits(name, shared):
    folder = shared / "models" / "families" / name
    if importlib.util.find_spec(f"mlx_lm.models.{model_type(folder)}") is None:
        pytest.skip("this mlx-lm does not have the architecture")
    plain, packed, batch = answers(folder, "8")
    assert packed == plain
    assert batch == packed


def model_type(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]
