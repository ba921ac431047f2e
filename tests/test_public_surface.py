"""Every capability is there under its name, says what it offers, and its example runs."""

import importlib
import re
import textwrap

import mlx.core as mx
import mlx_lm
import pytest
from sources import MODULES
from toy_adapters import write_adapter

import mlx_optiq_ext

#: Every package of the library but `files` and `kernels`, which serve them.
CAPABILITIES = sorted(
    module.partition(".")[2]
    for module, path in MODULES.items()
    if path.name == "__init__.py"
    and module.count(".") == 1
    and module.startswith("mlx_optiq_ext")
    and module not in ("mlx_optiq_ext.files", "mlx_optiq_ext.kernels")
)


@pytest.mark.parametrize("name", CAPABILITIES)
def test_a_capability_is_an_attribute_and_says_what_it_offers(name):
    capability = getattr(mlx_optiq_ext, name)
    assert capability is importlib.import_module(f"mlx_optiq_ext.{name}")
    assert name in mlx_optiq_ext.__all__
    assert capability.__all__ == sorted(capability.__all__, key=_order)
    assert all(hasattr(capability, each) for each in capability.__all__)


def _order(name):
    # Ruff's: constants, classes, functions.
    return (not name.isupper(), not name[0].isupper(), name)


def test_there_is_nothing_public_but_these():
    others = {"OptiqError", "__version__", "hookimpl", "hookspec", "status"}
    assert {*mlx_optiq_ext.__all__} == {*CAPABILITIES, *others}
    assert dir(mlx_optiq_ext) == sorted(mlx_optiq_ext.__all__)
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        _ = mlx_optiq_ext.no_such


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """What the examples name: texts, an adapter, a checkpoint of YOLO26."""
    folder = tmp_path_factory.mktemp("examples")
    text = "There are 12 apples in each box. How many are there in 7? " * 40
    for name in ("calibration.txt", "text.txt"):
        (folder / name).write_text(text)
    write_adapter(folder / "adapters" / "sql", mlx_lm.load(str(tiny))[0])
    head = {
        f"model.layers.23.one2one_cv3.layer{level}.layers.4.weight": mx.zeros((80, 1))
        for level in range(3)
    }
    stem = {"model.layers.0.conv.weight": mx.zeros((16, 3, 3, 3))}
    mx.save_safetensors(str(folder / "yolo26n.safetensors"), {**stem, **head})
    return folder


@pytest.mark.parametrize("name", ["", *CAPABILITIES])
def test_the_example_of_a_capability_runs(name, tiny, folder, monkeypatch, capsys):
    documented = importlib.import_module(f"mlx_optiq_ext.{name}".rstrip("."))
    (example,) = re.findall(r"::\n\n((?:    .*\n|\n)+)", f"{documented.__doc__}\n")
    monkeypatch.chdir(folder)
    code = textwrap.dedent(example).replace("Qwen/Qwen3-0.6B", str(tiny))
    assert f"mlx_optiq_ext import {name}\n" in code or "import mlx_optiq_ext\n" in code
    exec(compile(code, documented.__file__ or name, "exec"), {})
    assert capsys.readouterr().out.strip() or name == "kv"
