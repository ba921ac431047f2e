"""A stand-in mlx_lm whose modules the real patches do not know."""

import importlib
import itertools
import sys
from textwrap import dedent

import pytest

# wrapt's list of post-import hooks is global, so every module of every test has its own name.
_numbers = itertools.count()

TARGET = """
    def f():
        return "f"

    class Parent:
        def method(self):
            return "method"

        @staticmethod
        def static():
            return "static"

        @classmethod
        def create(cls):
            return cls.__name__

    class Child(Parent):
        pass
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the stand-in package and returns its full name."""
    monkeypatch.setenv("MLX_OPTIQ_EXT", "0")  # importing the stand-in must not arm the real hooks
    mine = {name: sys.modules.pop(name) for name in _loaded()}
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "mlx_lm"
    package.mkdir()
    (package / "__init__.py").touch()

    def write(source=TARGET):
        name = f"module_{next(_numbers)}"
        (package / f"{name}.py").write_text(dedent(source))
        importlib.invalidate_caches()
        return f"mlx_lm.{name}"

    yield write
    for name in _loaded():
        del sys.modules[name]
    sys.modules.update(mine)


def _loaded():
    return [name for name in sys.modules if name == "mlx_lm" or name.startswith("mlx_lm.")]
