"""Installed and unused, mlx-lm behaves as if we were not there."""

import re

import pytest

from mlx_optiq_hooks.commands.table import COMMANDS as TABLE

STOCK = {"MLX_OPTIQ_EXT": "0"}

#: Prints the help of every stock command that imports here, each ended by a form feed.
HELP = """
import contextlib, importlib, io, sys
for name in sys.argv[1:]:
    sys.argv = [f"mlx_lm.{name}", "--help"]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        importlib.import_module(f"mlx_lm.{name}").main()
    print(text.getvalue(), end="\\f")
"""
COMMANDS = ("convert", "server", "lora", "fuse", "generate", "chat", "cache_prompt", "perplexity")


#: Command -> how many options of ours it has at least.
OURS = {**dict.fromkeys(TABLE, 1), "convert": 5, "lora": 6}
OURS.pop("fuse")


@pytest.fixture(scope="module")
def helps(run):
    """The help of each command, with the package and without."""

    def of(env):
        text = run("python", "-c", HELP, *COMMANDS, env=env, check=True).stdout
        return dict(zip(COMMANDS, text.split("\f")[:-1], strict=True))

    return of({}), of(STOCK)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in OURS])
def test_help_of_a_command_without_options_of_ours_is_stock(helps, command):
    ours, stock = helps
    assert f"usage: mlx_lm.{command} " in stock[command]
    assert ours[command] == stock[command]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name in OURS])
def test_help_of_a_command_with_options_of_ours_differs_by_our_groups_only(helps, command):
    ours, stock = (each[command] for each in helps)
    assert "optiq" not in stock
    head, *groups = re.split(r"\noptiq [\w ]+ \(mlx-optiq-ext .*\):\n", ours)
    assert groups
    assert "".join(groups).count("--optiq-") >= OURS[command]
    # Our options also stand in the usage, where they move the line breaks; some nest brackets.
    without = re.sub(r"\[--optiq-(?:[^][]|\[[^]]*\])*\]", "", head)
    assert "optiq" not in without
    assert without.split() == stock.split()


@pytest.mark.parametrize("recipe", [("-q",), ("--dtype", "float16"), ("-q", "--q-bits", "3")])
def test_stock_conversion_writes_the_same_bytes(run, tiny, tmp_path, recipe):
    written, printed = [], []
    for folder, env in (("ours", {}), ("stock", STOCK)):
        working = tmp_path / folder
        working.mkdir()
        done = run("mlx_lm.convert", "--hf-path", tiny, *recipe, cwd=working, env=env, check=True)
        printed.append(done.stdout)
        files = sorted(path for path in working.rglob("*") if path.is_file())
        written.append({path.relative_to(working): path.read_bytes() for path in files})
    ours, stock = written
    assert len(ours) >= 4
    assert ours == stock
    assert printed[0] == printed[1]


DRAW = """
import sys, mlx_lm
from mlx_lm.models.cache import make_prompt_cache
model, tokenizer = mlx_lm.load(sys.argv[1])
print(mlx_lm.generate(model, tokenizer, "How many apples?", max_tokens=12, verbose=False))
print([type(each).__name__ for each in make_prompt_cache(model)])
"""


def test_generated_text_and_caches_are_the_same(run, tiny):
    ours, stock = (run("python", "-c", DRAW, tiny, env=env, check=True) for env in ({}, STOCK))
    assert ours.stdout == stock.stdout
    assert ours.stdout.strip().endswith("'KVCache']")
