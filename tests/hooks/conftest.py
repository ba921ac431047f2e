import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

import mlx_optiq_hooks


@dataclass(frozen=True)
class Outcome:
    """What a stock command's main() came to."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch, capsys, tmp_path) -> Callable[..., Outcome]:
    """Runs the main() of a stock command here, in an empty working folder."""
    folder = tmp_path / "working"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def command(name: str, *arguments: object) -> Outcome:
        module = importlib.import_module(f"mlx_lm.{name}")
        monkeypatch.setattr(sys, "argv", [f"mlx_lm.{name}", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            module.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        printed = capsys.readouterr()
        return Outcome(status, printed.out, printed.err)

    return command


@pytest.fixture
def fresh_gate():
    """Lets the gate judge anew, and again after the test."""
    mlx_optiq_hooks.gate.cache_clear()
    yield
    mlx_optiq_hooks.gate.cache_clear()
