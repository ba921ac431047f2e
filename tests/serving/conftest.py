"""Servers with keys, limits and adapters."""

import shutil
from pathlib import Path

import mlx_lm
import pytest
from live_server import serve
from mlx_lm import server as stock
from toy_adapters import write_adapter

KEY, OTHER = "first-key", "second-key"
#: From mlx-lm 0.31 on.
ORIGINS = ("--allowed-origins", "https://good.example") if hasattr(stock, "TimeBudget") else ()
BEARER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="package")
def folder(tiny, tmp_path_factory) -> Path:
    """A folder of adapters that clients may load from; its name has a space."""
    root = tmp_path_factory.mktemp("adapters") / "some adapters"
    model = mlx_lm.load(str(tiny))[0]
    # Names of the same weights would share one copy.
    for seed, name in enumerate(("a", "b")):
        write_adapter(root / name, model, seed=seed)
    shutil.copytree(root / "a", root / "damaged")
    (root / "damaged" / "adapters.safetensors").write_bytes(b"nothing")
    return root


@pytest.fixture(scope="package")
def server(tiny, folder, tmp_path_factory):
    """A server without a key, with an adapter, that may load more."""
    words = (f"--optiq-adapter=a={folder / 'a'}", "--optiq-adapter-dir", folder)
    more = ("--optiq-allow-adapter-updates", *ORIGINS)
    limits = ("--optiq-max-body", 200_000, "--optiq-client-timeout", 2)
    log = tmp_path_factory.mktemp("serving") / "log"
    with serve(log, "--model", tiny, *words, *more, *limits) as server:
        yield server


@pytest.fixture(scope="package")
def keyed(tiny, tmp_path_factory):
    """A server that asks for one of two keys."""
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "keys").write_text(f"# of the team\n\n{OTHER}\n")
    words = ("--optiq-api-key", KEY, "--optiq-api-key", f"@{folder / 'keys'}")
    with serve(folder / "log", "--model", tiny, *words) as server:
        yield server
