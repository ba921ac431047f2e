"""Tests do not reach for private names of ours to make time pass or sizes small."""

import ast

import pytest
from sources import ROOT, parsed

FILES = sorted((ROOT / "tests").rglob("*.py"))


def ours(node, tree) -> bool:
    """Whether an expression is, or comes of, something of our three packages."""
    if isinstance(node, ast.Constant):
        return str(node.value).startswith("mlx_optiq_")
    root = node
    while isinstance(root, ast.Attribute | ast.Call):
        root = root.value if isinstance(root, ast.Attribute) else (root.args or [root.func])[0]
    if isinstance(root, ast.Constant):
        return ours(root, tree)
    if not isinstance(root, ast.Name):
        return False
    for each in ast.walk(tree):
        if isinstance(each, ast.ImportFrom | ast.Import):
            source = each.module or "" if isinstance(each, ast.ImportFrom) else ""
            for alias in each.names:
                if (alias.asname or alias.name) == root.id:
                    return f"{source}.{alias.name}".lstrip(".").startswith("mlx_optiq_")
        if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == root.id:
            return "mlx_optiq_" in ast.unparse(each.value)
    return False


def patched(path):
    """The private names and constants of ours that a test file sets."""
    tree = parsed(path)
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr not in ("setattr", "object") or not node.args:
            continue
        target, *rest = node.args
        owner, name = target, ""
        if rest and isinstance(rest[0], ast.Constant):
            name = str(rest[0].value)
        if isinstance(target, ast.Constant):
            name = str(target.value).rpartition(".")[2]
        parts = [*ast.unparse(owner).split(".")[1:], name]
        private = any(part.startswith("_") and part != "__call__" for part in parts)
        if (private or name.isupper()) and ours(owner, tree):
            yield name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_name_of_ours_is_patched(path):
    assert list(patched(path)) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('from mlx_optiq_ext import kv\nm.setattr(kv, "LIMIT", 3)', ["LIMIT"]),
        ('from mlx_optiq_ext.kv.cache import Cache\nm.setattr(Cache, "_grow", f)', ["_grow"]),
        ('from mlx_optiq_ext import kv\nm.setattr(kv._Inner, "moved", f)', ["moved"]),
        ('m.setattr("mlx_optiq_ext.kv.cache._grow", f)', ["_grow"]),
        ('module = import_module("mlx_optiq_ext.kv")\nm.setattr(module, "STEP", 1)', ["STEP"]),
        ('from mlx_optiq_ext import kv\nm.setattr(kv, "mount", f)', []),
        ('import sys\nm.setattr(sys, "_framework", 1)', []),
    ],
)
def test_an_offender_is_found(tmp_path, line, found):
    path = tmp_path / "test_it.py"
    path.write_text(line)
    assert list(patched(path)) == found
