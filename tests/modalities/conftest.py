from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx_lm
import pytest
from mlx_lm.utils import save

from mlx_optiq_ext import files, modalities

from .checkpoints import KINDS, Kind, tensors, write


class Converted(NamedTuple):
    """A checkpoint and the text model made of it."""

    source: Path
    folder: Path
    wrapper: Any
    text: modalities.Text
    removed: tuple[str, ...]

    @property
    def config(self) -> dict:
        return files.read_json(self.folder / "config.json")


def load(folder: Path) -> tuple[Any, Any, dict]:
    """Load as the convert command does, with what the class demands handed down."""
    config = files.read_json(folder / "config.json")
    loaded: Any = mlx_lm.load(
        str(folder), model_config=modalities.handed_down(config), lazy=True, return_config=True
    )
    return loaded


def names(model: Any) -> set[str]:
    """Names of a model's tensors."""
    return set(tensors(model))


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Callable[[Kind], Path]:
    """Writes each kind of checkpoint once."""
    root, written = tmp_path_factory.mktemp("published"), {}

    def published(kind: Kind) -> Path:
        if kind.name not in written:
            written[kind.name] = write(kind, root / kind.name)
        return written[kind.name]

    return published


@pytest.fixture(scope="session", params=KINDS, ids=lambda kind: kind.name)
def kind(request) -> Kind:
    return request.param


@pytest.fixture(scope="session")
def converted(kind, published, tmp_path_factory) -> Converted:
    """Each kind, loaded, made text-only and saved as the convert command does."""
    source, folder = published(kind), tmp_path_factory.mktemp("text") / kind.name
    model, tokenizer, config = load(source)
    text = modalities.to_text(model, config, source)
    assert text is not None
    save(folder, source, text.model, tokenizer, dict(text.config), donate_model=False)
    return Converted(source, folder, model, text, modalities.remove_processor_files(folder))
