import argparse
import importlib
import re
from pathlib import Path

import pytest
from rivals import comparison, rows

import mlx_optiq_compat as compat

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def own_flags() -> dict[str, set[str]]:
    """Every --optiq option by command."""
    table = importlib.import_module("mlx_optiq_hooks.commands.table")
    found = {}
    for name, command in table.COMMANDS.items():
        group = argparse.ArgumentParser().add_argument_group()
        command.add_arguments(group)
        found[name] = {each for action in group._group_actions for each in action.option_strings}
    return found


def test_every_flag_stands_in_the_readme_and_every_flag_there_exists():
    existing = set().union(*own_flags().values())
    named = set(re.findall(r"--optiq-[a-z-]+[a-z]", README))
    assert existing
    assert named == existing


def test_the_compat_table_is_the_matrix():
    assert compat.readme_table() in README


def test_every_benchmark_named_in_the_readme_exists_with_its_command_line():
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests" / "benchmarks").rglob("*.py")
        if path.parent.name not in ("rivals", "designs", "fuzzing")
    }
    assert set(re.findall(r"`(tests/benchmarks/[\w/]+\.py)`", README)) == found
    for name in found:
        assert f"python {name}" in (ROOT / name).read_text()


def test_the_quality_table_is_what_the_rows_say():
    found = re.search(r"<!-- weights table of (.*?) -->", README)
    assert found
    folder = ROOT / "tests" / "benchmarks" / "results"
    measured = [row for name in found[1].split() for row in rows.read(folder / name)]
    printed = comparison.table(measured)
    assert printed
    assert comparison.placed(README, printed, found[1].split()) == README


def test_ci_runs_the_command_that_the_readme_gives():
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command in README
    assert "nox -f compat/noxfile.py" in command


@pytest.mark.parametrize(
    "switch",
    ["", "_API_KEY", "_BLOCK", "_TRACE", "_CACHE", "_PROMPT_CACHE", "_METAL_KERNEL", "_STREAM"],
)
def test_every_environment_switch_stands_in_the_readme(switch):
    name = f"MLX_OPTIQ_EXT{switch}"
    sources = [*(ROOT / "mlx_optiq_ext").rglob("*.py"), *(ROOT / "hooks").rglob("*.py")]
    assert any(f'"{name}"' in path.read_text() for path in sources)
    assert f"`{name}=" in README


def test_every_path_in_the_contributors_guide_exists():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:mlx_optiq_ext|hooks|compat|tests)/[\w/.]*)`", guide)
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []
    hooks = importlib.import_module("mlx_optiq_hooks.engine.spec").__dict__
    assert [name for name in re.findall(r"`(optiq_\w+)`", guide) if name not in hooks] == []
