"""Models, texts and plans for commands that run on several ranks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
import toy_models
from live_server import write_exact
from mlx_lm.models import ministral3
from mlx_lm.utils import save_model
from toy_fixtures import PLAIN

LAYERS = 6
VERSION = tuple(map(int, mlx_lm.__version__.split(".")[:3]))

needs_split_server = pytest.mark.skipif(
    VERSION < (0, 30, 6), reason="mlx-lm before 0.30.6 has no server on several ranks"
)

#: Commands of a test that differ by rank only in the folder that they run in.
APART = """
import importlib, os, sys
os.chdir(os.environ["MLX_RANK"])
name, *words = sys.argv[1:]
sys.argv = [f"mlx_lm.{name}", *words]
importlib.import_module(f"mlx_lm.{name}").main()
"""


@pytest.fixture(scope="session")
def exact(tiny, tmp_path_factory) -> Path:
    """The tiny model in float32; two heads of keys and values."""
    return write_exact(tiny, tmp_path_factory.mktemp("models") / "exact")


@pytest.fixture(scope="session")
def stages(tiny, tmp_path_factory) -> Path:
    """A random model that mlx-lm splits by heads, of which it has four, and by layers."""
    folder = tmp_path_factory.mktemp("models") / "stages"
    config = toy_models.config("ministral3") | {
        "num_hidden_layers": LAYERS,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"] * 2,
        "sliding_window": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
        "eos_token_id": 0,
    }
    mx.random.seed(3)
    model = ministral3.Model(ministral3.ModelArgs.from_dict(config))
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / name, folder)
    return folder


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> Path:
    """A plan with a precision of its own for each layer, and one layer left as it is."""
    path = tmp_path_factory.mktemp("plans") / "kv_config.json"
    entries = [
        {"layer_idx": 0, "bits": 8, "group_size": 32},
        {"layer_idx": 1, "k_bits": 8, "v_bits": 6, "group_size": 32},
        {"layer_idx": 2, "bits": 6, "group_size": 32, "k_rotated": True, "v_rotated": True},
        {"layer_idx": 4, "k_bits": 16, "v_bits": 5, "group_size": 32},
        {"layer_idx": 5, "bits": 5, "group_size": 32},
    ]
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Sentences of the tiny model's kind, of different lengths."""
    lines = (Path(__file__).resolve().parents[1] / "data" / "calibration.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    return [f"{row['question']} {row['answer']}" for row in rows]


@pytest.fixture(scope="session")
def calibration(texts, tmp_path_factory) -> Path:
    """Enough text for four windows."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n".join(texts)[:4700])
    return path


@pytest.fixture(scope="session")
def short(texts, tmp_path_factory) -> Path:
    """Enough text for two windows, of which one is held out."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text("\n".join(texts)[:2400])
    return path


@pytest.fixture(scope="session")
def converted(run, tiny, short, tmp_path_factory) -> Path:
    """The tiny model at 3.5 bits per weight, converted by one process, in float32."""
    folder = tmp_path_factory.mktemp("models") / "converted"
    words = ("--mlx-path", folder, *PLAIN, "--optiq-budget", 3.5, "--optiq-calibration", short)
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
