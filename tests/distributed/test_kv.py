"""Packed keys and values where mlx-lm splits a model over ranks."""

import json

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import generate_step

from mlx_optiq_ext import kv

PROMPT = list(range(5, 29))
COUNT = 12

#: Generates on every rank, and writes what this one's caches hold.
GENERATE = """
import json, sys
import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.utils import sharded_load
from mlx_optiq_ext import distributed, kv
from pathlib import Path

model, mixed, how, prompt, count = sys.argv[1:]
group = mx.distributed.init()
parts = (group, None) if how == "pipeline" else (None, group)
model, _ = sharded_load(model, *parts)
found = {}
for name, plan in (("8", kv.parse_spec("8")), ("mixed", kv.read_plan(Path(mixed)))):
    mounted = kv.mount(model, plan)
    caches = kv.make_caches(model)
    prompted = mx.array(json.loads(prompt))
    steps = generate_step(prompted, model, max_tokens=int(count), prompt_cache=caches)
    tokens = [int(token) for token, _ in steps]
    mx.synchronize(generation_stream)  # mlx-lm is one token ahead
    formats = {mounted.owners[slot]: str(f) for slot, f in mounted.formats.items()}
    held = {mounted.owners[i, None]: getattr(c, "nbytes", 0) for i, c in enumerate(caches)}
    found[name] = distributed.gathered([tokens, formats, held])
if distributed.leads():
    Path("found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def alone(stages, mixed):
    """What one process generates under each plan, and formats and bytes of its layers."""
    found = {}
    for name, plan in (("8", kv.parse_spec("8")), ("mixed", kv.read_plan(mixed))):
        assert plan is not None
        model = mlx_lm.load(str(stages))[0]
        mounted = kv.mount(model, plan)
        caches = kv.make_caches(model)
        steps = generate_step(mx.array(PROMPT), model, max_tokens=COUNT, prompt_cache=caches)
        tokens = [int(token) for token, _ in steps]
        formats = {mounted.owners[slot]: str(f) for slot, f in mounted.formats.items()}
        held = {mounted.owners[i, None]: getattr(c, "nbytes", 0) for i, c in enumerate(caches)}
        found[name] = tokens, formats, held
    return found


@pytest.fixture
def generated(launch, stages, mixed, tmp_path):
    """Runs `GENERATE`; plan -> what each rank found, layers as numbers."""

    def generated(count, how):
        words = (GENERATE, stages, mixed, how, json.dumps(PROMPT), COUNT)
        done = launch(count, "-c", *words, cwd=tmp_path)
        assert (tmp_path / "found.json").exists(), done.stdout + done.stderr
        found = json.loads((tmp_path / "found.json").read_text())
        return {
            plan: [(tokens, numbered(formats), numbered(held)) for tokens, formats, held in each]
            for plan, each in found.items()
        }

    return generated


def numbered(layers):
    return {int(layer): value for layer, value in layers.items()}


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_with_a_part_of_the_heads_generate_what_one_process_does(generated, alone, count):
    for plan, each in generated(count, "tensor").items():
        tokens, formats, held = alone[plan]
        assert [own[0] for own in each] == [tokens] * count
        assert all(own[1] == formats for own in each)
        share = {layer: nbytes / count for layer, nbytes in held.items()}
        assert all(own[2] == share for own in each)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_with_a_part_of_the_layers_generate_what_one_process_does(generated, alone, count):
    for plan, each in generated(count, "pipeline").items():
        tokens, formats, held = alone[plan]
        assert [own[0] for own in each] == [tokens] * count
        # The last rank has the first layers, and every layer is on one rank.
        assert [layer for own in reversed(each) for layer in own[2]] == list(held)
        assert {layer: f for own in each for layer, f in own[1].items()} == formats
        assert {layer: nbytes for own in each for layer, nbytes in own[2].items()} == held
