"""A small real model in float32, and stock servers over it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import Server, serve, write_exact

from mlx_optiq_ext.kv import PackedKVCache

PROBLEMS = (
    "There are 13 bricks in each bag and Noah buys 2 bags. Paul adds 12 bricks. "
    "How many bricks are there?",
    "Ivan has 25 stamps. Ana has twice as many stamps as Ivan. "
    "How many stamps do they have together?",
    "Mia has 31 apples and gives 12 apples to Tom. How many apples does Mia have left?",
)


@pytest.fixture(scope="session")
def exact(tiny, tmp_path_factory) -> Path:
    """The tiny model in float32, where a row of a batch computes what it would alone."""
    return write_exact(tiny, tmp_path_factory.mktemp("models") / "exact")


@pytest.fixture(scope="session")
def kv_config(tmp_path_factory) -> Path:
    """A plan with a precision of its own for each layer, and one layer left as it is."""
    path = tmp_path_factory.mktemp("plans") / "kv_config.json"
    entries = [
        {"layer_idx": 0, "bits": 8, "group_size": 64},
        {"layer_idx": 1, "k_bits": 8, "v_bits": 6, "group_size": 32},
        {"layer_idx": 2, "bits": 6, "group_size": 64, "k_rotated": True, "v_rotated": True},
        {"layer_idx": 4, "k_bits": 16, "v_bits": 5, "group_size": 64},
        {"layer_idx": 5, "bits": 5, "group_size": 32},
    ]
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="session")
def serving(exact, kv_config, tmp_path_factory) -> Iterator[Server]:
    """A server under the plan, which notes what each layer's cache holds."""
    folder = tmp_path_factory.mktemp("serving")
    code = probe("server", folder / "notes.jsonl")
    with serve(folder / "log", "--model", exact, "--optiq-kv", kv_config, code=code) as server:
        yield server


def saved(cache: PackedKVCache) -> list[Any]:
    """What mlx-lm saves of a cache: its state, and settings before mlx-lm 0.32."""
    from mlx_optiq_compat import symbols

    parts = [cache.state]
    if symbols.cache_has_meta_state(cache.planes[0]):
        parts.append(cache.meta_state)
    return parts


def probe(command: str, notes: Path) -> str:
    """Code that runs a command and notes what each update of a cache stores; see `held`."""
    return PROBE.replace("COMMAND", command).replace("NOTES", repr(str(notes)))


def held(notes: Path, *, rows: int = 1) -> dict[int, set[tuple[float, float]]]:
    """Layer -> bits that a key and a value took, in batches of at least so many rows."""
    seen: dict[int, set[tuple[float, float]]] = {}
    for layer, count, keys, values in map(json.loads, notes.read_text().splitlines()):
        if count >= rows:
            seen.setdefault(layer, set()).add((keys, values))
    return seen


def planned(config: Path) -> dict[int, set[tuple[float, float]]]:
    """What `held` finds under the plan of `kv_config`: two heads of 64, float32 scale and bias."""
    expected = {}
    for entry in json.loads(config.read_text()):
        sides = [entry.get(f"{side}_bits", entry.get("bits")) for side in "kv"]
        bits = [32 if b == 16 else b + 64 / entry["group_size"] for b in sides]
        expected[entry["layer_idx"]] = {tuple(2 * 64 * b for b in bits)}
    return expected


#: One line for each update: layer, rows, bits of a key, bits of a value.
PROBE = """
import importlib, json
from mlx_optiq_ext.kv import cache, layout

packed, update = layout.packed_caches, cache.PackedKVCache.update_and_fetch

def marked(caches, mounted):
    caches = packed(caches, mounted)
    for slot, layer in mounted.owners.items():
        if slot in mounted.formats:
            caches[slot[0]].layer = layer
    return caches

def noted(self, keys, values):
    result = update(self, keys, values)
    def bits(name):
        total = sum(getattr(p, name)[..., :1, :].nbytes for p in self.planes)
        return 8 * total / self.planes[0].keys.shape[0]
    with open(NOTES, "a") as stream:
        note = [self.layer, keys.shape[0], bits("keys"), bits("values")]
        stream.write(json.dumps(note) + "\\n")
    return result

layout.packed_caches, cache.PackedKVCache.update_and_fetch = marked, noted
importlib.import_module("mlx_lm.COMMAND").main()
"""
