"""The tiny model in float32, adapters made at random, and adapters trained to say their name."""

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.nn as nn
import mlx_lm
import pytest
from live_server import serve, write_exact
from toy_adapters import QUESTIONS, train, write_adapter

from mlx_optiq_ext.adapters import Offer

from .catalogue.generating import OFFERED

#: Adapters that answer with their own name, whatever is asked: the tiny model knows numbers best.
NAMES = ("11", "22", "33")


@pytest.fixture(scope="session")
def exact(tiny, tmp_path_factory) -> Path:
    """The tiny model in float32, where a row of a batch computes what it would alone."""
    return write_exact(tiny, tmp_path_factory.mktemp("models") / "exact")


@pytest.fixture
def model(exact) -> nn.Module:
    """That model, loaded."""
    return mlx_lm.load(str(exact))[0]


@pytest.fixture
def adapter(tmp_path, exact) -> Callable[..., Path]:
    """Writes an adapter for the model: ``adapter("A", rank=4, seed=1)``."""

    plain = mlx_lm.load(str(exact))[0]

    def adapter(name: str, **options) -> Path:
        return write_adapter(tmp_path / name, plain, **options)

    return adapter


@pytest.fixture(scope="module")
def folders(exact, tmp_path_factory):
    """Four adapters, and a damaged one."""
    root, plain = tmp_path_factory.mktemp("adapters"), mlx_lm.load(str(exact))[0]
    found = {
        name: write_adapter(root / name, plain, keys=("mlp.down_proj",), seed=seed)
        for seed, name in enumerate(OFFERED)
    }
    found["bad"] = shutil.copytree(found["a"], root / "bad")
    whole = (found["bad"] / "adapters.safetensors").read_bytes()
    (found["bad"] / "adapters.safetensors").write_bytes(whole[:-100])
    return found


@pytest.fixture
def offer(folders):
    return lambda name, folder=None: Offer(name, folder or name, folders[folder or name])


@pytest.fixture(scope="session")
def named(exact, tmp_path_factory) -> dict[str, Path]:
    """Adapters by name, each trained to answer with its name and nothing else."""
    root = tmp_path_factory.mktemp("named")
    return {name: train(exact, root / name, name) for name in NAMES}


@pytest.fixture(scope="package")
def folder(named, tmp_path_factory):
    """A folder of adapters that clients may load from."""
    root = tmp_path_factory.mktemp("loadable")
    for name, source in named.items():
        shutil.copytree(source, root / name)
    (root / "broken").mkdir()
    shutil.copy(root / "11" / "adapter_config.json", root / "broken")
    whole = (root / "11" / "adapters.safetensors").read_bytes()
    (root / "broken" / "adapters.safetensors").write_bytes(whole[: len(whole) // 2])
    return root


@pytest.fixture(scope="package")
def server(exact, named, folder, tmp_path_factory):
    """A server with two adapters that may load more."""
    log = tmp_path_factory.mktemp("serving") / "log"
    arguments = [f"--optiq-adapter={name}={named[name]}" for name in ("11", "22")]
    updates = ("--optiq-allow-adapter-updates", "--optiq-adapter-dir", folder)
    with serve(log, "--model", exact, *arguments, *updates) as server:
        yield server


@pytest.fixture(scope="package")
def plain(exact, tmp_path_factory):
    """What a server without adapters answers."""
    from .asking import ask

    with serve(tmp_path_factory.mktemp("plain") / "log", "--model", exact) as server:
        return {question: ask(server, None, question) for question in QUESTIONS}
