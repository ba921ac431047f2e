"""A small real model in float32, and stock servers over it."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.utils import save_model

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
    folder = tmp_path_factory.mktemp("models") / "exact"
    model, _ = mlx_lm.load(str(tiny))[:2]
    model.set_dtype(mx.float32)
    save_model(folder, model)
    config = json.loads((tiny / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / name, folder)
    return folder


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen
    log: Path

    def client(self):
        """A real OpenAI client."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(self, question: str, **options) -> str:
        """The greedy answer to a question."""
        done = self.client().chat.completions.create(
            model="default_model",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=40,
            **options,
        )
        return done.choices[0].message.content or ""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def serve(log: Path, *arguments: object, code: str = "from mlx_lm.server import main; main()"):
    """Run ``mlx_lm.server`` until the block ends."""
    port = free_port()
    command = [sys.executable, "-c", code, "--port", str(port), "--log-level", "INFO"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, *map(str, arguments)], stdout=stream, stderr=stream, text=True
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait(server)
        yield server
    finally:
        process.kill()
        process.wait(10)


def _wait(server: Server) -> None:
    for _ in range(300):
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended: {server.log.read_text()[-2000:]}")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{server.url}/health", timeout=1)
            return
        time.sleep(0.1)
    raise RuntimeError(f"the server does not answer: {server.log.read_text()[-2000:]}")


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

packed, update = layout.packed, cache.PackedKVCache.update_and_fetch

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

layout.packed, cache.PackedKVCache.update_and_fetch = marked, noted
importlib.import_module("mlx_lm.COMMAND").main()
"""
