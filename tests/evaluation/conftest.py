import shutil
from pathlib import Path

import mlx.nn as nn
import pytest
from mlx_lm.utils import load_model, save_model

PROBLEMS = [
    f"There are {n} apples in each of {k} boxes. How many apples are there?"
    for n in range(3, 12)
    for k in range(2, 7)
]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Every test starts without a journal."""
    monkeypatch.setenv("MLX_OPTIQ_EXT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def packed(tiny, tmp_path_factory) -> Path:
    """The tiny model at 4 bits."""
    folder = tmp_path_factory.mktemp("models") / "packed"
    model, config = load_model(tiny)
    nn.quantize(model, group_size=32, bits=4)
    config["quantization"] = {"bits": 4, "group_size": 32}
    save_model(folder, model)
    copy_tokenizer(tiny, folder)
    import json

    (folder / "config.json").write_text(json.dumps(config))
    return folder


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(PROBLEMS))
    return path
