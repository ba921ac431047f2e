"""A trained model answers from memory, from disk and without a cache alike."""

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

from mlx_optiq_ext import kv

from .conftest import Toy, stored, tiered

TEXTS = Path(__file__).parents[1] / "data" / "calibration.jsonl"
#: Tokens of prompts behind their common beginning, and of an answer.
LENGTHS, ANSWER = (70, 33, 44, 51), 8


@pytest.mark.shared
@pytest.mark.newest
@pytest.mark.parametrize("spec", ["16", "8", "4"])
def test_ref_24m_answers_as_without_a_cache(shared, tmp_path, spec):
    model, tokenizer = mlx_lm.load(str(shared / "models" / "ref-24m"))[:2]
    model.set_dtype(mx.float32)
    if spec != "16":
        kv.mount(model, kv.parse_spec(spec))  # pyright: ignore[reportArgumentType]
    own = Toy(model, f"ref-24m {spec}")
    rows = [json.loads(line)["question"] for line in TEXTS.read_text().splitlines()]
    tokens = tokenizer.encode(" ".join(rows))
    asked = [[*tokens[:20], *tokens[count : 2 * count]] for count in LENGTHS]

    def alone(cache=None):
        return [own.answer(each, ANSWER, cache) for each in asked]

    def together(cache=None):
        return own.answers(asked, ANSWER, cache)

    for ask in (alone, together):
        at, expected = stored(tmp_path / ask.__name__, block=16), ask()
        assert len({tuple(each) for each in expected}) > 1
        cache = tiered(own, at)
        assert ask(cache) == expected  # computed
        assert ask(cache) == expected  # in memory
        assert at.writer.flush()
        own.seen = 0
        assert ask(tiered(own, stored(tmp_path / ask.__name__, block=16))) == expected
        assert own.seen == len(asked)
