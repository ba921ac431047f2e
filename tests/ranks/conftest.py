"""A calibration text, a converted model and a data set for commands that run on several ranks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

#: Commands of a test that differ by rank only in the folder that they run in.
APART = """
import importlib, os, sys
os.chdir(os.environ["MLX_RANK"])
name, *words = sys.argv[1:]
sys.argv = [f"mlx_lm.{name}", *words]
importlib.import_module(f"mlx_lm.{name}").main()
"""


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Sentences of the tiny model's kind, of different lengths."""
    lines = (Path(__file__).resolve().parents[1] / "data" / "calibration.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    return [f"{row['question']} {row['answer']}" for row in rows]


@pytest.fixture(scope="session")
def calibration(texts, tmp_path_factory) -> Path:
    """Enough text for six windows."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n".join(texts)[:7000])
    return path


@pytest.fixture(scope="session")
def converted(run, tiny, calibration, tmp_path_factory) -> Path:
    """The tiny model at 3.5 bits per weight, converted by one process, in float32."""
    folder = tmp_path_factory.mktemp("models") / "converted"
    words = ("--mlx-path", folder, "--optiq-budget", 3.5, "--optiq-calibration", calibration)
    cache = {"MLX_OPTIQ_EXT_CACHE": str(tmp_path_factory.mktemp("cache"))}
    words = (*words, "--dtype", "float32")
    run("mlx_lm.convert", "--hf-path", tiny, *words, env=cache, check=True)
    return folder


@pytest.fixture
def apart(launch, tmp_path) -> Callable:
    """Runs a stock command on two ranks, each in a folder of its own that ``fill`` has filled."""

    def apart(fill: Callable[[Path, int], None], *words: object):
        for rank in range(2):
            folder = tmp_path / "ranks" / str(rank)
            folder.mkdir(parents=True)
            fill(folder, rank)
        return launch(2, "-c", APART, *map(str, words), cwd=tmp_path / "ranks")

    return apart
