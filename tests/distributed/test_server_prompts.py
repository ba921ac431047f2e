"""Prompts on disk where a model is split: each rank keeps its part, and all take up the same."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from live_server import Server, serve, settled
from mlx_lm.models import ministral3
from mlx_lm.utils import save_model

from .conftest import needs_split_server
from .live_ranks import SERVE, serve_ranks

pytestmark = [needs_split_server, pytest.mark.newest]

#: Each rank works in a folder of its own, as hosts do, and has a log there.
APART = """
import os, sys
folder = f"rank-{os.environ['MLX_RANK']}"
os.makedirs(folder, exist_ok=True)
os.chdir(folder)
sys.stderr = open("log", "w", buffering=1)
"""
STORIES = [
    " ".join(f"There are {i} bricks in bag {i * n % 17}." for i in range(60)) for n in (3, 4, 5)
]


@pytest.fixture(scope="session")
def uneven(stages, tmp_path_factory) -> Path:
    """A random model with a sliding window in the first of its layers only."""
    folder = tmp_path_factory.mktemp("models") / "uneven"
    shutil.copytree(stages, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["layer_types"] = ["sliding_attention", *["full_attention"] * 5]
    mx.random.seed(5)
    save_model(folder, ministral3.Model(ministral3.ModelArgs.from_dict(settings)))
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def asked(server: Server) -> list[str]:
    """Answers to three conversations, each of which goes on, and to one that is not batched."""
    found = []
    for story, seed in (*((story, None) for story in STORIES), (STORIES[0] + "?", 1)):
        messages = [{"role": "user", "content": story}]
        for _ in range(2):
            done = server.client().chat.completions.create(
                model="default_model",
                messages=messages,  # pyright: ignore[reportArgumentType]
                temperature=0,
                max_tokens=6,
                seed=seed,
            )
            found.append(done.choices[0].message.content or "")
            messages += [
                {"role": "assistant", "content": found[-1]},
                {"role": "user", "content": "Why?"},
            ]
    return found


def taken(folder: Path) -> list[int]:
    """How many tokens of each prompt were not computed; the same on both ranks."""
    totals = []
    for log in sorted(folder.glob("rank-?/log")):
        found = re.findall(r"tokens: (\d+) from memory, (\d+) from disk", log.read_text())
        totals.append([int(memory) + int(disk) for memory, disk in found])
    assert totals[0] == totals[1]
    return totals[0]


def blocks(folder: Path, rank: int) -> list[Path]:
    """The blocks of one rank, in the order in which they were written."""
    found = (folder / f"rank-{rank}").glob("prompts/*/*.safetensors")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("how", ["tensor", "pipeline"])
def test_ranks_go_on_from_what_all_of_them_have(exact, uneven, tmp_path, how):
    model, words = (exact, ()) if how == "tensor" else (uneven, ("--pipeline",))
    with serve(tmp_path / "log-plain", "--model", model) as server:
        expected = asked(server)
    own = ("--model", model, *words, "--optiq-prompt-cache", "prompts")
    with serve_ranks(2, tmp_path, *own, code=APART + SERVE) as server:
        assert asked(server) == expected
        settled(tmp_path)
    assert taken(tmp_path)[0] == 0
    # One rank lacks the second block of the first story, the other the first one of the second.
    blocks(tmp_path, 1)[1].unlink()
    damaged = blocks(tmp_path, 0)[2]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with serve_ranks(2, tmp_path, *own, code=APART + SERVE) as server:
        assert asked(server) == expected
    first, _, second, _, third, _, alone, more = taken(tmp_path)
    assert alone > 512
    assert more > 512
    # All but the last token; what the second lacks, the first story has in memory.
    assert (first, second < 256, third) == (256 if how == "tensor" else 0, True, 678)
