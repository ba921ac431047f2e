"""What moved between releases is known to compat alone; what is private is named by a patch."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_optiq_compat import symbols
from mlx_optiq_compat.matrix import supported
from mlx_optiq_compat.signature import of_release, recorded, unspan
from mlx_optiq_compat.source import MODULES
from mlx_optiq_hooks import tables

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    path
    for folder in (ROOT / "mlx_optiq_ext", ROOT / "hooks" / "mlx_optiq_hooks")
    for path in sorted(folder.rglob("*.py"))
    if path.name != "_version.py"
]


def moved():
    """Members that model and cache classes have in some supported releases and lack in others."""
    releases, signatures = recorded()
    rows = {row.mlx_lm for row in supported()}
    spans = {
        name: set().union(*(unspan(text, releases) for text in each.values())) & rows
        for name, each in signatures.items()
    }
    return {
        name.rpartition(".")[2]
        for name, found in spans.items()
        if name.startswith("mlx_lm.models.")
        and found
        and found != rows
        and "." in name.partition(":")[2]
        and spans.get(name.rpartition(".")[0]) == rows
    }


MOVED = moved()


def test_members_that_moved_are_known():
    assert {"meta_state", "keys_and_values"} <= MOVED
    assert not {"update_and_fetch", "merge", "caches"} & MOVED


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_condition_on_a_release_stands_outside_of_compat(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert list(conditions(tree)) == []


def conditions(tree):
    """Lines that ask what the installed mlx-lm or MLX is like."""
    theirs = {"mlx_lm"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            source = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for each in node.names:
                full = f"{source}.{each.name}".strip(".")
                if full.partition(".")[0] == "mlx_lm" or full == "mlx.core":
                    theirs.add(each.asname or each.name.partition(".")[0])
    docs = {id(node.body[0].value) for node in ast.walk(tree) if documented(node)}  # pyright: ignore[reportAttributeAccessIssue]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and probes(node, theirs):
            yield ast.unparse(node)
        elif isinstance(node, ast.Try) and any(map(imports_mlx_lm, node.body)):
            yield from (f"except {each}" for each in map(gone, node.handlers) if each)
        elif isinstance(node, ast.Constant) and id(node) not in docs and is_version(node.value):
            yield repr(node.value)
        elif isinstance(node, ast.Attribute) and node.attr == "__version__":
            yield ast.unparse(node)


def documented(node):
    return (
        isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    )


def probes(call, theirs):
    """hasattr, getattr with a default, or inspect.signature, of what is mlx-lm's or MLX's."""
    function = ast.unparse(call.func)
    if function not in ("hasattr", "getattr", "inspect.signature", "signature") or not call.args:
        return False
    if function == "getattr" and (len(call.args) < 3 or "__wrapped__" in ast.unparse(call)):
        return False  # the second finds the original under a wrapper of ours
    root = call.args[0]
    while isinstance(root, ast.Attribute | ast.Subscript | ast.Call):
        root = root.func if isinstance(root, ast.Call) else root.value
    if isinstance(root, ast.Name) and root.id in theirs:
        return True
    name = call.args[1] if len(call.args) > 1 else None
    return isinstance(name, ast.Constant) and name.value in MOVED


def gone(handler):
    """What a handler catches of an import that failed, unless it says so by raising."""
    caught = ast.unparse(handler.type) if handler.type is not None else "Exception"
    raises = any(isinstance(node, ast.Raise) for node in ast.walk(handler))
    return caught if not raises and re.search(r"\b(ImportError|\w*Exception)\b", caught) else None


def imports_mlx_lm(node):
    return (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_lm")) or (
        isinstance(node, ast.Import) and any(n.name.startswith("mlx_lm") for n in node.names)
    )


def is_version(value):
    return isinstance(value, str) and re.fullmatch(r"\d+\.\d+\.\d+", value) is not None


@pytest.mark.parametrize(
    "code",
    [
        "from mlx_lm import utils\nhasattr(utils, 'load')",
        "import mlx.core as mx\nd = getattr(mx, 'device_info', None) or mx.metal.device_info",
        "import inspect, mlx_lm\n'x' in inspect.signature(mlx_lm.load).parameters",
        "hasattr(cache, 'meta_state')",
        "try:\n    from mlx_lm.utils import get_model_path\nexcept ImportError:\n    pass",
        "import mlx_lm\nold = mlx_lm.__version__ < '0.32.0'",
    ],
)
def test_each_kind_of_condition_would_be_found(code):
    assert list(conditions(ast.parse(code)))


@pytest.mark.parametrize("row", supported(), ids=lambda row: row.mlx_lm)
def test_what_is_imported_from_mlx_lm_is_there_in_every_release(row):
    known = of_release(row.mlx_lm)
    compat = (ROOT / "compat" / "mlx_optiq_compat").glob("*.py")
    imported = {
        f"{node.module}:{each.name}"
        for path in (*FILES, *compat)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mlx_lm"
        for each in node.names
    }
    assert len(imported) > 10
    assert {
        name for name in imported if name not in known and name.replace(":", ".") not in MODULES
    } == set()


def test_what_is_private_to_mlx_lm_is_named_by_a_patch():
    named = {
        part
        for patch in tables()
        for name in (patch.target, *patch.uses)
        for part in name.partition(":")[2].split(".")
    }
    _, signatures = recorded()
    private = {
        name.partition(":")[2].split(".")[-1]
        for name in signatures
        if re.search(r"[:.]_(?!_)\w+$", name)
    }
    used = {
        (node.attr, str(path.relative_to(ROOT)))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in private
        and ast.unparse(node.value) not in ("self", "cls")
    }
    assert {each for each in used if each[0] not in named} == set()


def test_a_stream_that_is_handed_over_is_the_one_that_counts():
    from mlx_lm.generate import generation_stream

    assert symbols.generation_stream({"stream": "theirs"}) == "theirs"
    assert symbols.generation_stream({}) is generation_stream


def test_the_device_is_described():
    info = symbols.device_info() if hasattr(mx, "device_info") else {}
    assert isinstance(info, dict)
    assert symbols.kernel_compiler("metal") is mx.fast.metal_kernel
    assert symbols.kernel_compiler("neither") is None


def test_model_arguments_tell_what_must_be_there():
    from mlx_lm.models import qwen3

    arguments = symbols.model_arguments(qwen3)
    assert arguments["hidden_size"] is True
    assert arguments["rope_scaling"] is False
    assert "vision_config" not in arguments


def test_a_cache_says_whether_it_keeps_settings_apart():
    assert symbols.cache_has_meta_state(SimpleNamespace(meta_state=""))
    assert not symbols.cache_has_meta_state(SimpleNamespace())


def test_a_model_loads_with_every_release(tiny):
    model, _, config = symbols.load(str(tiny), lazy=True, return_config=True)
    assert len(model.layers) == config["num_hidden_layers"]
