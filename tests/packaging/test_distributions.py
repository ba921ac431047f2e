"""The wheel, the sdist and an editable install: what they carry, start and take away."""

import json
import re
import subprocess
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from mlx_optiq_compat import rows, verdict
from mlx_optiq_compat.version import within

pytestmark = pytest.mark.build

ROOT = Path(__file__).resolve().parents[2]
START_UP = ("mlx_optiq_ext.pth", "mlx_optiq_ext.start")
#: Folder in the repository -> where the wheel has it.
SOURCES = {
    "mlx_optiq_ext": "",
    "hooks/mlx_optiq_hooks": "hooks/",
    "compat/mlx_optiq_compat": "compat/",
}


def source_files():
    """Every file of the three packages as the repository has it."""
    return {
        path.relative_to(ROOT).as_posix()
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_carries_the_packages_and_both_start_up_files(distributions):
    with zipfile.ZipFile(distributions.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        pth = wheel.read("mlx_optiq_ext.pth")
    expected = {name.removeprefix("hooks/").removeprefix("compat/") for name in source_files()}
    assert names == expected | set(START_UP)
    assert {"mlx_optiq_compat/matrix.toml", "mlx_optiq_compat/signatures.json"} <= names
    assert pth == (ROOT / "hooks" / "mlx_optiq_ext.pth").read_bytes()
    assert pth.count(b"\n") == 1


def test_the_sdist_carries_the_sources_and_the_tests(distributions):
    with tarfile.open(distributions.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert source_files() <= names
    assert {f"hooks/{name}" for name in START_UP} <= names
    assert {"docs/flags.md", "mkdocs.yml"} <= names
    assert {"README.md", "LICENSE", "CHANGELOG.md", "tests/packaging/conftest.py"} <= names
    assert not {name for name in names if name.split("/")[0] in (".git", ".venv", "shared")}


def test_the_metadata_names_what_we_stand_on(distributions):
    with zipfile.ZipFile(distributions.wheel) as wheel:
        (name,) = (each for each in wheel.namelist() if each.endswith("/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    needs = metadata.get_all("Requires-Dist") or []
    for package in ("mlx-lm", "wrapt", "pluggy", "numpy", "safetensors", "jinja2"):
        assert any(need.startswith(package) for need in needs), package
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"cpu", "test"} <= set(metadata.get_all("Provides-Extra") or [])


def extras(distributions):
    """Extra -> its requirements as the wheel declares them."""
    with zipfile.ZipFile(distributions.wheel) as wheel:
        (name,) = (each for each in wheel.namelist() if each.endswith("/METADATA"))
        needs = Parser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist") or []
    found = {}
    for need in needs:
        what, _, marker = need.partition(";")
        if extra := re.search(r"extra == '([^']+)'", marker):
            found.setdefault(extra[1], []).append(what.strip())
    return found


def test_the_extra_yolo_keeps_to_releases_that_run_with_its_mlx(distributions):
    data = tomllib.loads((ROOT / "compat/mlx_optiq_compat/matrix.toml").read_text())
    tested = data["yolo_mlx"]["tested_with"]
    (bound,) = (each for each in extras(distributions)["yolo"] if each.startswith("mlx-lm"))
    newest = [row for row in rows() if within(row.mlx_lm, bound.removeprefix("mlx-lm"))][-1]
    assert newest.mlx_lm == tested["mlx_lm"]
    assert within(tested["mlx"], newest.mlx)


def test_the_extras_resolve_to_an_mlx_and_an_mlx_lm_that_run_together(environment, distributions):
    fresh, report = environment(), distributions.wheel.with_name("report.json")
    ask = ("install", "--dry-run", "--ignore-installed", "--report", report)
    fresh.pip(*ask, f"{distributions.wheel}[yolo,cpu]")
    chosen = {
        each["metadata"]["name"]: each["metadata"]["version"]
        for each in json.loads(report.read_text())["install"]
    }
    assert verdict(chosen["mlx-lm"], chosen["mlx"]).kind == "pinned", chosen


START = """
import sys
package = sys.modules.get("mlx_optiq_ext")
print("mlx_optiq_ext._activation" in sys.modules, "wrapt" in sys.modules)
print(package and package.__file__)
"""
ARM = """
import sys, mlx_lm.utils
print(type(mlx_lm.utils.quantize_model).__name__, "mlx_optiq_hooks" in sys.modules)
"""


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_it_starts_where_installed_and_is_gone_when_removed(
    environment, distributions, fake_mlx_lm, kind
):
    fresh, fake = environment(), fake_mlx_lm()
    before = set(fresh.site.iterdir())

    def python(code, env=None):
        command = [str(fresh.python), "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env)

    assert python(START).stdout == "False False\nNone\n"

    fresh.install(*{"editable": ["-e", ROOT]}.get(kind) or [getattr(distributions, kind)])
    assert set(START_UP) <= {path.name for path in fresh.site.iterdir()}
    home = ROOT if kind == "editable" else fresh.site
    started = python(START)
    assert started.stdout == f"True False\n{home / 'mlx_optiq_ext' / '__init__.py'}\n"
    assert started.stderr == ""
    assert python(ARM, fake).stdout == "FunctionWrapper True\n"
    assert python(ARM, {**fake, "MLX_OPTIQ_EXT": "0"}).stdout == "function False\n"
    status = subprocess.run(
        [str(fresh.python), "-m", "mlx_optiq_ext", "--verbose"],
        capture_output=True,
        text=True,
        env=fake,
    )
    assert "start-up file (.pth): ran\n" in status.stdout
    assert "mlx_lm.utils:quantize_model: live" in status.stdout

    fresh.pip("uninstall", "--yes", "mlx-optiq-ext")
    assert set(fresh.site.iterdir()) == before
    gone = python(START)
    assert (gone.stdout, gone.stderr) == ("False False\nNone\n", "")
    assert python(ARM, fake).stdout == "function False\n"
