"""Trained models answer under packed caches as they do under plain ones, alone and in a batch."""

import importlib
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
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


NAMES = ("Mia", "Tom", "Ana", "Ivan", "Noah", "Paul")
TEMPLATES = (
    "There are {x} bricks in each bag and {a} buys 2 bags. {b} adds {y} bricks. "
    "How many bricks are there?",
    "{a} has {x} stamps. {b} has twice as many stamps as {a}. "
    "How many stamps do they have together?",
    "{a} has {z} apples and gives {y} apples to {b}. How many apples does {a} have left?",
)
#: Keys' biases, and what queries keep there, as real models learn to ask little of them.
BIAS, ASKED = 50.0, 0.02


class Biased(nn.Module):
    """Adds a bias to keys before RoPE turns them."""

    def __init__(self, norm: nn.Module, bias: mx.array):
        super().__init__()
        self.norm = norm
        self.bias = bias

    def __call__(self, keys: mx.array) -> mx.array:
        return self.norm(keys) + self.bias


def with_key_biases(model: Any) -> None:
    """Biases of 50 times the keys' deviation, in one pair that RoPE turns slowly and two fast.

    The pairs are those of each layer that matter least for its answers.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        keys, queries = attention.k_norm.weight, attention.q_norm.weight
        sizes = mx.abs(keys * queries).reshape(2, -1).sum(axis=0)
        fast, slow = mx.argsort(sizes[:10])[:2], 24 + mx.argsort(sizes[24:])[:1]
        chosen = mx.concatenate([fast, slow])
        half = mx.zeros(sizes.shape).at[chosen].add(1.0)
        places = mx.concatenate([half, half])
        attention.k_norm = Biased(attention.k_norm, places * BIAS * keys.mean())
        attention.q_norm.weight = mx.where(places > 0, ASKED * queries, queries)


@pytest.mark.newest
def test_four_bits_keep_the_answers_of_a_model_with_key_biases(tiny):
    model, tokenizer = mlx_lm.load(str(tiny))[:2]
    model.set_dtype(mx.float32)
    with_key_biases(model)
    questions = [
        TEMPLATES[i % 3].format(
            a=NAMES[i % 6], b=NAMES[(i // 6 + i + 1) % 6], x=11 + i, y=2 + i % 9, z=21 + i
        )
        for i in range(20)
    ]
    prompts = prompts_of(tokenizer, [{"question": each} for each in questions], plain=False)
    plain, kept = together(model, tokenizer, prompts, 24), {}
    for spec in ("4", "4p"):
        plan = kv.parse_spec(spec)
        assert plan is not None
        kv.mount(model, plan)
        rows = zip(together(model, tokenizer, prompts, 24), plain, strict=True)
        same = [a == b for row in rows for a, b in itertools.zip_longest(*row)]
        kept[spec] = sum(same) / len(same)
    assert kept["4"] >= 0.95
    assert kept["4p"] <= 0.2


def model_type(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]
