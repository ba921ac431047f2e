"""The hooks are documented, and what we implement is what they declare."""

import inspect
import re
from pathlib import Path

import pytest

from mlx_optiq_ext import plugins
from mlx_optiq_hooks import builtin
from mlx_optiq_hooks.engine import spec

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
HOOKS = {
    name: function
    for name, function in vars(spec).items()
    if getattr(function, f"{plugins.PROJECT}_spec", None) is not None
}


def test_the_spec_declares_nothing_but_hooks_with_our_prefix():
    functions = {name for name, value in vars(spec).items() if inspect.isfunction(value)}
    assert functions == HOOKS.keys()
    assert len(HOOKS) >= 8
    assert all(name.startswith("optiq_") for name in HOOKS)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_says_what_it_does_and_when_and_what_comes_back(name):
    text = inspect.getdoc(HOOKS[name]) or ""
    assert text[:1].isupper()
    assert re.search(r"\b[Cc]alled|[Rr]eturn|choices", text)
    first = getattr(HOOKS[name], f"{plugins.PROJECT}_spec")["firstresult"]
    assert ("First result" in text) is first


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_and_its_arguments_stand_in_the_documentation(name):
    row = re.search(rf"^\| `{name}\(([^)`]*)\)` \| .+ \| (.+) \|$", PAGE, re.MULTILINE)
    assert row, f"docs/plugins.md has no row for {name}"
    arguments = [each.strip() for each in row[1].split(",") if each.strip()]
    assert arguments == list(inspect.signature(HOOKS[name]).parameters)
    first = getattr(HOOKS[name], f"{plugins.PROJECT}_spec")["firstresult"]
    assert ("first result" in row[2]) is first


def test_the_documentation_names_no_hook_that_does_not_exist():
    assert set(re.findall(r"\boptiq_[a-z_]+(?=\()", PAGE)) <= HOOKS.keys()


def test_our_own_plugin_implements_declared_hooks_only():
    ours = {name for name in vars(builtin) if name.startswith("optiq_")}
    assert {"optiq_add_arguments", "optiq_quant_predicate"} <= ours <= HOOKS.keys()
