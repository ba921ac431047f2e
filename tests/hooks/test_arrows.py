"""Which way the imports point. Read from source by ast; lazy and type-checking imports count."""

import sys

import pytest
from sources import MODULES, ROOT, circles, imports, module_of, of

#: What every room may import: messages, files, versions, and what status() is to show.
GROUND = ("errors", "files", "_status", "_version")

#: Each room of the library -> the rooms that it may import beside these. ``planning`` is shared by
#: what plans, ``model`` by what runs a model; no arrow points back.
ARROWS = {
    "plugins": (),
    "turboquant": (),
    "kernels": (),
    "distributed": (),
    "model": ("distributed",),
    "planning": ("distributed", "model"),
    "kv": ("distributed", "kernels", "model", "planning", "turboquant"),
    "latency": ("kv", "model"),
    "weights": ("distributed", "kernels", "latency", "model", "planning"),
    "lora": ("distributed", "model", "planning"),
    "serving": (),
    "prompts": ("distributed", "kv", "model"),
    "adapters": ("distributed", "lora", "serving"),
    "modalities": ("model",),
    "yolo": ("model", "planning"),
    "evaluation": ("kv", "latency", "model", "planning"),
}

#: What starts the package may know all of it. The trigger imports the hooks late, when mlx_lm is
#: imported, and the hooks import the library: this circle is how one line in a .pth file can be
#: all that runs at interpreter start.
ENTRY = ("", "__main__", "_activation")

#: What is asked late by those that it puts together: the hooks by the trigger, the table of patches
#: and the plugin manager by the commands and patches that stand in them.
LATE = ("mlx_optiq_hooks", "mlx_optiq_hooks.installation", "mlx_optiq_ext._activation")

#: Lines of a file, and modules beside each other in a folder.
LINES, MODULES_IN_A_FOLDER = 300, 14


def room(module):
    """The room of a module of the library; "" for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def arrows():
    """(room, other room) -> the imports that make it one."""
    found = {}
    for module in of("mlx_optiq_ext"):
        for name in imports(module):
            other = module_of(name)
            if other and other.startswith("mlx_optiq_ext") and room(other) != room(module):
                found.setdefault((room(module), room(other)), []).append(f"{module} -> {name}")
    return found


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


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("mlx_optiq_hooks.engine")])
def test_the_engine_knows_no_command_and_no_patch(module):
    rooms = ("mlx_optiq_hooks.commands", "mlx_optiq_hooks.patches")
    assert [name for name in imports(module) if name.startswith(rooms)] == []


def test_rooms_import_what_the_table_allows():
    strange = {
        f"{source} -> {other}": lines
        for (source, other), lines in arrows().items()
        if source not in (*ENTRY, *GROUND) and other not in (*GROUND, *ARROWS.get(source, ()))
    }
    assert strange == {}


def test_every_room_stands_in_the_table():
    assert {room(module) for module in of("mlx_optiq_ext")} == {*ARROWS, *GROUND, *ENTRY}


def test_the_ground_stands_on_itself():
    below = {(a, b) for a, b in arrows() if a in GROUND} - {("_status", "_activation")}
    assert {b for _, b in below} <= {*GROUND}


def test_no_arrows_run_in_a_circle():
    assert circles(ARROWS) == {}


@pytest.mark.parametrize("top_only", [True, False], ids=["at import", "late"])
def test_no_import_runs_in_a_circle(top_only):
    graph = {
        module: {module_of(name) for name in imports(module, top_only=top_only)} - {None, *LATE}
        for module in MODULES
    }
    assert circles(graph) == {}


def test_weights_is_no_library_for_the_others():
    lines = [
        line
        for (source, other), found in arrows().items()
        if other == "weights" and source not in ENTRY
        for line in found
    ]
    assert len(lines) <= 2, f"{len(lines)} imports into weights: {lines}"


def test_no_file_is_long():
    long = {name: n for name, n in lengths().items() if n > LINES}
    assert long == {}


def lengths():
    """Lines of every file that somebody reads: Python and kernels, tests too."""
    paths = [
        *MODULES.values(),
        *(ROOT / "mlx_optiq_ext").rglob("*.h"),
        *(path for end in ("py", "h") for path in (ROOT / "tests").rglob(f"*.{end}")),
        *(ROOT / "compat").glob("*.py"),
    ]
    return {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in paths}


def test_no_folder_is_crowded():
    crowded = {}
    folders = {path.parent for path in MODULES.values()} | {
        path.parent for path in (ROOT / "tests").rglob("*.py")
    }
    for folder in folders:
        count = len(
            [p for p in folder.glob("*.py") if p.name not in ("__init__.py", "conftest.py")]
        )
        if count > MODULES_IN_A_FOLDER:
            crowded[str(folder.relative_to(ROOT))] = count
    assert crowded == {}


@pytest.mark.parametrize("package", [m for m, p in MODULES.items() if p.name == "__init__.py"])
def test_no_name_of_a_package_hides_a_module_of_it(package):
    bound = {name.rpartition(".")[2]: name for name in imports(package, top_only=True)}
    hidden = {
        name: source
        for name, source in bound.items()
        if f"{package}.{name}" in MODULES and source != f"{package}.{name}"
    }
    assert hidden == {}
