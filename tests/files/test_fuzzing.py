"""A share of tests/benchmarks/fuzz_readers.py: docs/benchmarks.md tells of 20,000 each."""

import random
import tempfile
from pathlib import Path

import fuzz_readers
import pytest
from fuzzing.mutations import MUTATIONS

NAMES = (
    *("config and headers", "headers of towers", "plan", "measured KL", "KV plan"),
    *("saved prompt cache", "adapter", "PEFT adapter", "calibration", "test items"),
    *("cached measurements", "chip", "COCO labels", "tokenizer config", "request"),
    *("YOLO .pt", "YOLO .npz", "YOLO .safetensors"),
)


@pytest.mark.newest
def test_every_reader_accepts_or_refuses_what_is_damaged():
    found = fuzz_readers.watch(NAMES, 200)
    assert {name: outcome.failures for name, outcome in found.items() if outcome.failures} == {}
    assert all(outcome.mutations == 200 for outcome in found.values())
    assert all(outcome.accepted for outcome in found.values())
    refused = {name for name, outcome in found.items() if outcome.refused}
    assert refused == set(NAMES) - {"cached measurements"}


@pytest.mark.newest
def test_all_readers_are_named():
    from fuzzing.readers import all_readers

    with tempfile.TemporaryDirectory() as scratch:
        assert set(all_readers(Path(scratch))) == set(NAMES)


def test_mutations_are_seeded_and_change_something():
    content = {".json": b'{"a": [1, {"b": "c"}]}', ".jsonl": b'{"a": 1}\n{"b": 2}'}
    for suffix, whole in content.items():
        made = [MUTATIONS[suffix](random.Random(n), whole) for n in range(50)]
        assert made == [MUTATIONS[suffix](random.Random(n), whole) for n in range(50)]
        assert len(set(made)) > 30


@pytest.mark.newest
def test_readers_that_misbehave_are_found():
    names = [f"broken: {what}" for what in ("raises", "hangs", "fills memory", "runs", "dies")]
    found = fuzz_readers.watch(names, 1)
    why = [outcome.failures[0][1] for outcome in found.values()]
    assert [outcome.mutations for outcome in found.values()] == [1] * 5
    assert why[0].startswith("IndexError")
    assert why[1] == "hangs"
    assert why[2].startswith("MemoryError")
    assert why[3].startswith("ran os.system")
    assert why[4].startswith("crashes (1)")
