import argparse
import ast
import importlib
import re
from pathlib import Path

import pytest
from rivals import comparison, rows
from sources import MODULES, parsed

import mlx_optiq_compat as compat

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: Name of a page of the documentation -> its text.
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
DOCS = "\n".join([README, *PAGES.values()])
BENCHMARKS = PAGES["benchmarks.md"]


def own_flags() -> dict[str, set[str]]:
    """Every --optiq option by command."""
    table = importlib.import_module("mlx_optiq_hooks.commands.table")
    found = {}
    for name, command in table.COMMANDS.items():
        group = argparse.ArgumentParser().add_argument_group()
        command.add_arguments(group)
        found[name] = {each for action in group._group_actions for each in action.option_strings}
    return found


def test_every_flag_stands_in_the_documentation_and_every_flag_there_exists():
    existing = set().union(*own_flags().values())
    named = set(re.findall(r"--optiq-[a-z-]+[a-z]", DOCS))
    assert existing
    assert named == existing


@pytest.mark.newest
def test_the_generated_pages_are_current(run):
    done = run("python", ROOT / "docs" / "generate.py", "--check")
    assert done.stdout + done.stderr == ""
    assert compat.markdown_table() in PAGES["compatibility.md"]


def test_the_readme_is_short_and_says_where_the_rest_is():
    assert len(README.encode()) <= 8000
    named = set(re.findall(r"\(docs/([\w-]+\.md)[#)]", README))
    assert named == PAGES.keys() - {"index.md"}
    for page, anchor in re.findall(r"\(docs/([\w-]+\.md)#([\w-]+)\)", README):
        headings = re.findall(r"^#+ (.+)$", PAGES[page], re.MULTILINE)
        assert anchor in [heading.lower().replace(" ", "-") for heading in headings]


def test_a_result_in_the_readme_is_one_of_the_benchmarks():
    """Its quality table is columns of theirs, for one kind of text."""
    found = re.search(r"<!-- results on (\w+) -->\n(.+?)<!-- end -->", README, re.DOTALL)
    assert found
    lines = [line.strip("| \n").split(" | ") for line in found[2].strip().splitlines()[2:]]
    assert len(lines) >= 4
    for model, *figures in lines:
        table = BENCHMARKS.partition(f"\n{model}, ")[2].partition("\n\n")[2].partition("\n\n")[0]
        rows_of_kind = [
            [cell.strip().partition(" ")[0] for cell in line.split("|")[1:-1]]
            for line in table.splitlines()
            if f"| {found[1]} |" in line
        ]
        assert figures in [[row[0], row[2], row[4], row[5]] for row in rows_of_kind]


def test_releases_in_the_readme_are_those_of_the_matrix():
    known = [row.mlx_lm for row in compat.rows() if row.verdict != "outside"]
    assert f"mlx-lm {known[0]} to {known[-1]}" in README


def test_every_benchmark_named_in_the_documentation_exists_with_its_command_line():
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests" / "benchmarks").rglob("*.py")
        if path.parent.name not in ("rivals", "designs", "fuzzing")
    }
    assert (
        set(re.findall(r"^\| `(tests/benchmarks/[\w/]+\.py)`", BENCHMARKS, re.MULTILINE)) == found
    )
    assert set(re.findall(r"`(tests/benchmarks/[\w/]+\.py)`", DOCS)) == found
    for name in found:
        assert f"python {name}" in (ROOT / name).read_text()


def test_the_quality_table_is_what_the_rows_say():
    found = re.search(r"<!-- weights table of (.*?) -->", BENCHMARKS)
    assert found
    folder = ROOT / "tests" / "benchmarks" / "results"
    measured = [row for name in found[1].split() for row in rows.read(folder / name)]
    printed = comparison.table(measured)
    assert printed
    assert comparison.placed(BENCHMARKS, printed, found[1].split()) == BENCHMARKS


def test_ci_runs_the_command_that_the_readme_gives():
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command in README
    assert "nox -f compat/noxfile.py" in command


@pytest.mark.parametrize(
    "switch",
    ["", "_API_KEY", "_BLOCK", "_TRACE", "_CACHE", "_PROMPT_CACHE", "_METAL_KERNEL", "_STREAM"],
)
def test_every_environment_switch_stands_in_the_documentation(switch):
    name = f"MLX_OPTIQ_EXT{switch}"
    sources = [*(ROOT / "mlx_optiq_ext").rglob("*.py"), *(ROOT / "hooks").rglob("*.py")]
    assert any(f'"{name}"' in path.read_text() for path in sources)
    assert f"`{name}=" in DOCS


def test_every_path_in_the_contributors_guide_exists():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:mlx_optiq_ext|hooks|compat|tests)/[\w/.]*)`", guide)
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []
    hooks = importlib.import_module("mlx_optiq_hooks.engine.spec").__dict__
    assert [name for name in re.findall(r"`(optiq_\w+)`", guide) if name not in hooks] == []


def literals():
    """Every string of the sources; what is filled in stands as a null character."""
    for module in MODULES:
        for node in ast.walk(parsed(MODULES[module])):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    each.value if isinstance(each, ast.Constant) else "\0" for each in node.values
                )
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_message_in_troubleshooting_is_one_that_we_print():
    known = "\n".join(literals())
    named = re.findall(r"^\| `(.+?)` \|", PAGES["troubleshooting.md"], re.MULTILINE)
    assert len(named) > 40
    stocks = "unrecognized arguments: --optiq-..."
    parts = [part for message in named if message != stocks for part in message.split("...")]
    assert [part for part in parts if part.strip() not in known] == []
