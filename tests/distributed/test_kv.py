"""Packed keys and values where mlx-lm splits a model over ranks."""

import json
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from mlx_optiq_ext import kv
from mlx_optiq_ext.kv import transform_file
from mlx_optiq_ext.kv.key_statistics import transforms

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

model, mixed, transformed, how, prompt, count = sys.argv[1:]
plans = {"8": kv.parse_spec("8")}
plans |= {name: kv.read_plan(Path(path)) for name, path in (("mixed", mixed), ("x", transformed))}
group = mx.distributed.init()
parts = (group, None) if how == "pipeline" else (None, group)
model, _ = sharded_load(model, *parts)
found = {}
for name, plan in plans.items():
    mounted = kv.mount(model, plan)
    caches = kv.make_caches(model)
    prompted = mx.array(json.loads(prompt))
    steps = generate_step(prompted, model, max_tokens=int(count), prompt_cache=caches)
    tokens = [int(token) for token, _ in steps]
    mx.synchronize(generation_stream)  # mlx-lm is one token ahead
    formats = {
        mounted.owners[slot]: f"{f} {getattr(f.keys, 'transform', None)}"
        for slot, f in mounted.formats.items()
    }
    held = {mounted.owners[i, None]: getattr(c, "nbytes", 0) for i, c in enumerate(caches)}
    found[name] = distributed.gathered([tokens, formats, held])
if distributed.leads():
    Path("found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def transformed(stages, tmp_path_factory):
    """A plan whose keys of five bits go through transforms fitted to a text."""
    path = tmp_path_factory.mktemp("transformed") / "kv_config.json"
    layers = [{"layer_idx": 1, "k_bits": 5, "v_bits": 8, "group_size": 32, "k_transformed": True}]
    path.write_text(json.dumps(layers))
    model = mlx_lm.load(str(stages))[0]
    mounted = kv.mount(model, kv.read_plan(path))
    (slot,) = (slot for slot in mounted.formats if mounted.owners[slot] == 1)
    open_ = replace(mounted, formats={slot: kv.read_plan(path).layers[1]})
    found = transforms(model, open_, np.arange(400, dtype=np.int32)[None])
    transform_file.write(path.parent / transform_file.FILE, {1: found[slot]})
    return path


def described(formats, part=0, parts=1):
    """Formats of a layer, and the transform of a process's share of the heads."""
    transform = getattr(formats.keys, "transform", None)
    if transform is not None:
        share = len(transform.centre) // parts
        transform = transform.of_heads(part * share, part * share + share)
    return f"{formats} {transform}"


@pytest.fixture(scope="module")
def alone(stages, mixed, transformed):
    """What one process generates under each plan, and formats and bytes of its layers."""
    found = {}
    plans = {"8": kv.parse_spec("8")}
    plans |= {"mixed": kv.read_plan(mixed), "x": kv.read_plan(transformed)}
    for name, plan in plans.items():
        assert plan is not None
        model = mlx_lm.load(str(stages))[0]
        mounted = kv.mount(model, plan)
        caches = kv.make_caches(model)
        steps = generate_step(mx.array(PROMPT), model, max_tokens=COUNT, prompt_cache=caches)
        tokens = [int(token) for token, _ in steps]
        formats = {mounted.owners[slot]: f for slot, f in mounted.formats.items()}
        held = {mounted.owners[i, None]: getattr(c, "nbytes", 0) for i, c in enumerate(caches)}
        found[name] = tokens, formats, held
    return found


@pytest.fixture
def generated(launch, stages, mixed, transformed, tmp_path):
    """Runs `GENERATE`; plan -> what each rank found, layers as numbers."""

    def generated(count, how):
        words = (GENERATE, stages, mixed, transformed, how, json.dumps(PROMPT), COUNT)
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
        for rank, own in enumerate(each):
            assert own[1] == {n: described(f, rank, count) for n, f in formats.items()}
        share = {layer: nbytes / count for layer, nbytes in held.items()}
        assert all(own[2] == share for own in each)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_with_a_part_of_the_layers_generate_what_one_process_does(generated, alone, count):
    for plan, each in generated(count, "pipeline").items():
        tokens, formats, held = alone[plan]
        assert [own[0] for own in each] == [tokens] * count
        # The last rank has the first layers, and every layer is on one rank.
        assert [layer for own in reversed(each) for layer in own[2]] == list(held)
        assert {layer: f for own in each for layer, f in own[1].items()} == {
            layer: described(f) for layer, f in formats.items()
        }
        assert {layer: nbytes for own in each for layer, nbytes in own[2].items()} == held
