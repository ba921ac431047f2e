"""Our options in the stock commands' help, and what is said of options that do not exist."""

import argparse
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_optiq_hooks.commands.table import COMMANDS
from mlx_optiq_hooks.engine.command import grouped
from mlx_optiq_hooks.engine.suggestion import suggestion

KNOWN = {
    "convert": ["--optiq-budget", "--optiq-kv-budget", "--optiq-pin"],
    "server": ["--optiq-kv", "--optiq-adapter"],
    "fuse": [],
}


def options(name):
    group = argparse.ArgumentParser().add_argument_group()
    COMMANDS[name].add_arguments(group)
    return group._group_actions


# mlx_lm.evaluate imports lm-eval, which not every release of mlx-lm can.
@pytest.mark.parametrize("name", [n for n in COMMANDS if options(n) and n != "evaluate"])
def test_the_help_shows_our_options_in_their_groups(command, name):
    done = command(name, "--help")
    assert done.status == 0
    titles = re.findall(r"^optiq ([\w ]+) \(mlx-optiq-ext [\w.]+\):$", done.out, re.MULTILINE)
    expected = grouped(options(name), COMMANDS[name].groups)
    assert titles == list(expected)
    shown = re.split(r"^optiq [\w ]+ \(mlx-optiq-ext .*$", done.out, flags=re.MULTILINE)[1:]
    for text, actions in zip(shown, expected.values(), strict=True):
        found = re.findall(r"^  (--optiq-[a-z-]+)", text, re.MULTILINE)
        assert found == [action.option_strings[0] for action in actions]


def test_convert_has_the_groups_that_a_user_looks_for():
    titles = list(grouped(options("convert"), COMMANDS["convert"].groups))
    assert titles == ["budget", "calibration", "effort", "KV cache", "other"]


@pytest.mark.parametrize("name", COMMANDS)
def test_groups_name_options_that_exist_and_each_help_line_is_finished(name):
    actions = {action.dest.removeprefix("optiq_"): action for action in options(name)}
    named = [each for members in COMMANDS[name].groups.values() for each in members]
    assert set(named) <= actions.keys()
    assert len(named) == len(set(named))
    for action in actions.values():
        assert action.help
        assert action.help[0].isupper()
        assert action.help.endswith(".")


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        (
            "convert",
            ["--optiq-buget", "4"],
            "no option --optiq-buget: did you mean --optiq-budget?",
        ),
        ("convert", ["--optiq-kv=4"], "--optiq-kv is an option of mlx_lm.server, not of"),
        ("server", ["--x", "--optiq-pin", "a=4"], "--optiq-pin is an option of mlx_lm.convert"),
        ("server", ["--optiq-pins"], "did you mean --optiq-pin of mlx_lm.convert?"),
        ("fuse", ["--optiq-adapter", "a=b"], "is an option of mlx_lm.server, not of mlx_lm.fuse"),
        ("convert", ["--optiq-xyzzy"], "no option --optiq-xyzzy: mlx_lm.convert --help lists them"),
    ],
)
def test_an_unknown_option_gets_the_nearest_one_or_its_command(name, words, said):
    assert said in (suggestion(name, words, KNOWN) or "")


def test_nothing_is_said_of_options_that_are_not_ours():
    assert suggestion("convert", ["--budget", "4", "optiq"], KNOWN) is None


@given(st.text(max_size=20), st.sampled_from(sorted(KNOWN)))
def test_any_unknown_option_gets_one_sentence_that_names_it(text, name):
    option = f"--optiq-{text}"
    said = suggestion(name, [option], KNOWN)
    assert said is not None
    assert option.partition("=")[0] in said


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("convert", ["--optiq-buget", "4"], "did you mean --optiq-budget?"),
        ("convert", ["--optiq-budget", "0"], "'0' is not a number of bits per weight"),
        ("convert", ["--optiq-budget"], "argument --optiq-budget: expected one argument"),
        ("convert", ["--optiq-b", "4"], "ambiguous option: --optiq-b could match"),
        ("convert", ["--hf-path", "x", "--optiq-pin", "a=4"], "--optiq-pin needs --optiq-budget"),
        (
            "server",
            ["--optiq-kv-budget", "4"],
            "is an option of mlx_lm.convert, not of mlx_lm.server",
        ),
        ("fuse", ["--optiq-kv", "4"], "not of mlx_lm.fuse"),
        ("lora", ["--optiq-init", "zero"], "argument --optiq-init: invalid choice"),
    ],
)
def test_an_error_of_ours_is_one_line_without_usage(command, name, words, said):
    done = command(name, *words)
    assert done.status == 2
    assert said in done.err
    assert re.fullmatch(rf"mlx_lm\.{name}: error: .+\n", done.err)


@pytest.mark.parametrize("words", [["--foo"], ["--optiq-budget", "4", "--foo"], ["--q-bits", "x"]])
def test_an_error_of_stocks_keeps_its_usage(command, words):
    done = command("convert", "--hf-path", "x", *words)
    assert done.status == 2
    assert done.err.startswith("usage: ")
    assert list(map(str, words))[-1] in done.err.splitlines()[-1]


def test_what_runs_in_place_of_a_command_does_not_hide_an_unknown_option(command):
    done = command("benchmark", "--optiq-predict", "list", "--bogus")
    assert (done.status, done.out) == (2, "")
    assert "unrecognized arguments: --bogus" in done.err
