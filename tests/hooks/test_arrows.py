"""Which way the imports point, and what the patch tables promise. Read from source by ast."""

import ast
import sys
from pathlib import Path

import pytest

from mlx_optiq_compat import feature, rows
from mlx_optiq_compat.signature import of_release
from mlx_optiq_hooks import tables
from mlx_optiq_hooks.engine.gate import FEATURES

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "mlx_optiq_ext": ROOT / "mlx_optiq_ext",
    "mlx_optiq_hooks": ROOT / "hooks" / "mlx_optiq_hooks",
    "mlx_optiq_compat": ROOT / "compat" / "mlx_optiq_compat",
}
MODULES = {
    ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(
        ".__init__"
    ): path
    for package, folder in PACKAGES.items()
    for path in folder.rglob("*.py")
}


def imports(module, *, top_only=False):
    """The full names of what a module imports; ``from x import y`` gives ``x.y``."""
    path = MODULES[module]
    body = ast.parse(path.read_text(encoding="utf-8"))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in _nodes(body) if top_only else ast.walk(body):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level]
            stem = [*(base if node.level else []), *([node.module] if node.module else [])]
            yield from (".".join([*stem, each.name]) for each in node.names)


def _nodes(body):
    # What runs when the module is imported: not functions, nor what only a type checker reads.
    for node in ast.iter_child_nodes(body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _nodes(node)


def of(package):
    return [module for module in MODULES if module.split(".")[0] == package]


def outside(names):
    return {name.split(".")[0] for name in names} - {"mlx_optiq_ext"}


@pytest.mark.parametrize("module", of("mlx_optiq_ext"))
def test_the_library_knows_neither_its_hooks_nor_the_matrix_nor_wrapt(module):
    banned = {"wrapt", "mlx_optiq_hooks", "mlx_optiq_compat"}
    # One door, inside functions: symbols, what moved between the releases of mlx-lm.
    found = outside(set(imports(module)) - {"mlx_optiq_compat.symbols"}) & banned
    assert found == ({"mlx_optiq_hooks"} if module == "mlx_optiq_ext._activation" else set())
    assert not outside(imports(module, top_only=True)) & banned


@pytest.mark.parametrize("module", MODULES)
def test_mlx_lm_is_imported_inside_functions_only(module):
    assert "mlx_lm" not in {name.split(".")[0] for name in imports(module, top_only=True)}


@pytest.mark.parametrize("module", of("mlx_optiq_ext"))
def test_the_library_uses_public_names_of_mlx_lm_only(module):
    names = [name for name in imports(module) if name.split(".")[0] == "mlx_lm"]
    assert [name for name in names if any(part.startswith("_") for part in name.split("."))] == []


@pytest.mark.parametrize("module", of("mlx_optiq_compat"))
def test_compat_stands_on_the_standard_library_alone(module):
    allowed = {*sys.stdlib_module_names, "mlx_optiq_compat"}
    assert {name.split(".")[0] for name in imports(module, top_only=True)} <= allowed
    inside = {"mlx", "mlx_lm"} if module == "mlx_optiq_compat.symbols" else set()
    assert {name.split(".")[0] for name in imports(module)} <= allowed | inside


def test_the_trigger_imports_sys_only():
    assert set(imports("mlx_optiq_ext._activation", top_only=True)) == {"sys"}
    assert set(imports("mlx_optiq_ext", top_only=True)) == {"mlx_optiq_ext._activation"}


def test_no_import_runs_in_a_circle():
    graph = {
        module: {_module_of(name) for name in imports(module, top_only=True)} - {None, module}
        for module in MODULES
    }
    # A package's own parts may not need its __init__ back; leaves go first until none is left.
    while leaves := {module for module, needs in graph.items() if not needs}:
        graph = {m: needs - leaves for m, needs in graph.items() if m not in leaves}
    assert graph == {}


def _module_of(name):
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


@pytest.mark.parametrize("patch", tables(), ids=lambda patch: patch.target)
def test_a_patch_gives_its_reason_and_what_would_end_it(patch):
    assert patch.feature in FEATURES
    assert len(patch.why.split()) > 3
    assert "#" in patch.upstream or patch.upstream.startswith("none: ")
    assert (patch.wrapper is None) is not (patch.replace is None)


def test_no_feature_patches_an_attribute_twice():
    targets = [(patch.feature, patch.target) for patch in tables()]
    assert len(targets) == len(set(targets))


@pytest.mark.parametrize("version", [row.mlx_lm for row in rows() if row.verdict != "outside"])
def test_what_patches_replace_and_use_is_recorded_for_the_releases_of_its_feature(version):
    recorded = of_release(version)
    modules = {target.partition(":")[0] for target in recorded}
    carried = [p for p in tables() if p.feature == "flags" or feature(p.feature, version).on]
    wanted = [name for patch in carried for name in (patch.target, *patch.uses)]
    missing = [target for target in wanted if target not in recorded]
    assert [target for target in missing if target.partition(":")[0] in modules] == []
    assert {target.partition(":")[0] for target in missing} <= {"mlx_lm.cli"}


def test_rooms_are_not_crowded():
    long = {m: n for m, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 300}
    assert long == {}
