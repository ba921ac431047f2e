"""Our options on the stock commands: every form of a command, and what they leave behind."""

import argparse
import importlib
import re
import sys
from pathlib import Path

import pytest

from mlx_optiq_hooks.commands.table import COMMANDS
from mlx_optiq_hooks.engine import flags, main_module, session

#: Adds --optiq-demo N to convert and server and hands N to mlx-lm as the predicate.
DEMO = """
from mlx_optiq_ext import OptiqError, hookimpl

@hookimpl
def optiq_add_arguments(command, group):
    if command in ("convert", "server"):
        group.add_argument("--optiq-demo", type=int, metavar="N", help="For the test.")

@hookimpl
def optiq_check_options(options, args):
    if options.demo == 13:
        raise OptiqError("--optiq-demo 13 is unlucky: give another number")

def predicate(path, module):
    return True

@hookimpl
def optiq_quant_predicate(options):
    predicate.__qualname__ = f"demo {options.demo}"
    return predicate
"""
PLAIN = "{'model': None, 'bits': None, 'quant_predicate': None}\n"


@pytest.fixture
def demo(fake_mlx_lm, plugin):
    """The environment of a stand-in mlx-lm with a plugin."""
    return plugin(fake_mlx_lm(), "demo", DEMO)


FORMS = [["-m", "mlx_lm", "convert"], ["-m", "mlx_lm.convert"], ["-mmlx_lm.convert"]]
FORMS += [["-X", "utf8", "-Wignore", "-Im", "mlx_lm.convert"]]


@pytest.mark.parametrize("form", FORMS[:3], ids=" ".join)
def test_every_form_takes_our_options_and_keeps_them_from_mlx_lm(run, demo, form):
    done = run("python", *form, "--optiq-demo", "3", env=demo, check=True)
    named = re.sub(r"<function (.*?) at 0x\w+>", r"\1", done.stdout)
    assert named == PLAIN.replace("'quant_predicate': None", "'quant_predicate': demo 3")


@pytest.mark.parametrize("form", FORMS[:3], ids=" ".join)
def test_without_our_options_every_form_is_stock(run, demo, form):
    assert run("python", *form, env=demo, check=True).stdout == PLAIN


@pytest.mark.parametrize("form", [["mlx_lm", "server"], ["mlx_lm.server"]], ids=" ".join)
def test_a_plugins_option_reaches_a_server_that_builds_its_parser_in_main(run, demo, form):
    done = run("python", "-m", *form, "--optiq-demo", "3", "--port", "1", env=demo, check=True)
    assert done.stdout == "{'port': 1}\n"
    refused = run("python", "-m", *form, "--optiq-demo", "13", env=demo)
    assert refused.returncode == 2
    assert refused.stderr.endswith("error: --optiq-demo 13 is unlucky: give another number\n")


@pytest.mark.parametrize("form", FORMS, ids=" ".join)
def test_the_module_that_runs_as_main_is_recognised(form):
    rest = ["convert"] if form[-1] == "convert" else []
    arguments = [*rest, "--hf-path", "-m", "--optiq-budget=4"]
    interpreter = form[: len(form) - len(rest)]
    found = main_module.requested(
        ["-m", *arguments], ["python", *interpreter, *arguments], COMMANDS
    )
    assert found == (None if rest else "mlx_lm.convert")


@pytest.mark.parametrize(
    ("argv", "original"),
    [
        (["-m", "--budget", "4"], ["-m", "mlx_lm.convert", "--budget", "4"]),
        (["-m", "--optiq-budget", "4"], ["-m", "mlx_lm.manage", "--optiq-budget", "4"]),
        (["-m", "--optiq-budget", "4"], ["-m", "other.convert", "--optiq-budget", "4"]),
        (["script.py", "-m", "mlx_lm.convert", "--optiq-budget"], ["script.py", "-m"]),
        (["-c", "--optiq-budget"], ["-c", "pass", "--optiq-budget"]),
        ([], ["python"]),
    ],
)
def test_other_programs_are_left_alone(argv, original):
    assert main_module.requested(argv, ["python", *original], COMMANDS) is None


@pytest.mark.parametrize(
    "words", [["-c", "FILE"], ["-cFILE"], ["--config=FILE"], ["--conf", "FILE"]]
)
def test_a_key_of_ours_in_the_yaml_file_counts_as_an_option(tmp_path, words):
    file = tmp_path / "c.yaml"
    words = [word.replace("FILE", str(file)) for word in words]
    original = ["python", "-m", "mlx_lm.lora", *words]
    assert main_module.requested(["-m", *words], original, COMMANDS) is None  # no such file
    file.write_text("train: true\n")
    assert main_module.requested(["-m", *words], original, COMMANDS) is None
    for key in ("optiq_rank_scaling", "optiq-rank-scaling", "'optiq_rank_scaling' "):
        file.write_text(f"train: true\n{key}: by_bits\n")
        assert main_module.requested(["-m", *words], original, COMMANDS) == "mlx_lm.lora"


LEAK = """
import sys, mlx_lm.convert
convert = sys.modules["mlx_lm.convert"]
for arguments in (["--optiq-demo", "3"], []):
    sys.argv = ["mlx_lm.convert", *arguments]
    convert.main()
    mlx_lm.convert(None)
    convert.quantize_model(None, {}, None, None)
"""


def test_options_do_not_outlive_the_run_they_were_given_to(run, demo):
    given, *rest = run("python", "-c", LEAK, env=demo, check=True).stdout.splitlines(True)
    assert "demo 3" in given
    assert rest == [PLAIN] * 3


def test_options_are_gone_after_a_run_that_failed():
    def broken():
        running = session.running()
        assert running is not None
        running.options = object()  # pyright: ignore[reportAttributeAccessIssue]
        assert session.current() is running
        raise ValueError("broken command")

    with pytest.raises(ValueError, match="broken command"):
        flags.main("convert")(broken, None, (), {})
    assert session.running() is None


def test_a_parser_used_outside_its_command_refuses_our_options(run, demo):
    code = (
        "import sys, mlx_lm.convert; convert = sys.modules['mlx_lm.convert']\n"
        "print(convert.configure_parser().parse_args([]).q_mode)\n"
        "convert.configure_parser().parse_args(['--optiq-demo', '3'])"
    )
    done = run("python", "-c", code, env=demo)
    assert (done.returncode, done.stdout) == (2, "affine\n")
    assert "--optiq-* options need the command's own main()" in done.stderr


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ('"--optiq-budget"', "adds an option that mlx_lm.convert has already: "),
        ('"--q-bits"', "adds an option that mlx_lm.convert has already: "),
        ('"--demo"', "adds --demo to mlx_lm.convert: options must start with --optiq-"),
        ('"--optiq-demo", default=3', "adds --optiq-demo to mlx_lm.convert: "),
    ],
)
def test_a_plugin_may_only_add_options_of_its_own(run, fake_mlx_lm, plugin, options, complaint):
    source = (
        "from mlx_optiq_ext import hookimpl\n\n@hookimpl(trylast=True)\n"
        f"def optiq_add_arguments(command, group):\n    group.add_argument({options})\n"
    )
    env = plugin(fake_mlx_lm(), "demo", source)
    for arguments in (["--help"], []):
        done = run("python", "-m", "mlx_lm", "convert", *arguments, env=env)
        assert done.returncode == 2
        assert complaint in done.stderr
        assert "Traceback" not in done.stderr


def test_abbreviations_work_as_before_and_for_ours(command):
    module = importlib.import_module("mlx_lm.convert")
    stock = {
        option: action
        for action in module.configure_parser()._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    ours = ["--optiq-budget", "--optiq-bits", "--optiq-group-sizes", "--optiq-calibration"]
    names = [*stock, *ours, "--optiq-sensitivity", "--help"]
    for option, action in stock.items():
        others = [name for name in stock if stock[name] is not action]
        for end in range(3, len(option)):
            if not any(name.startswith(option[:end]) for name in others):
                assert not any(name.startswith(option[:end]) for name in set(names) - {*stock})
    outcome = command("convert", "--hf", "nowhere", "--mlx", "out", "--optiq-bud", "0")
    assert outcome.status == 2
    assert "argument --optiq-budget: '0' is not" in outcome.err
    assert "ambiguous option: --optiq-b could match --optiq-budget, --optiq-bits" in (
        command("convert", "--optiq-b", "4").err
    )


def test_argparse_itself_is_untouched():
    view = importlib.import_module("mlx_lm.server").argparse
    assert argparse.ArgumentParser.__module__ == "argparse"
    assert view is not argparse
    assert issubclass(view.ArgumentParser, argparse.ArgumentParser)
    assert view.Namespace is argparse.Namespace
    assert view.ArgumentTypeError is argparse.ArgumentTypeError
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = view.NoSuchName


@pytest.mark.parametrize("name", ["mlx_lm.convert", "mlx_lm"])
def test_a_console_script_takes_our_options(run, name):
    if not Path(sys.executable).with_name(name).exists():
        name = "mlx_lm.convert"  # the umbrella script came with mlx-lm 0.30.6
    arguments = ["convert"] if name == "mlx_lm" else []
    done = run(name, *arguments, "--optiq-budget", "0")
    assert done.returncode == 2
    assert "argument --optiq-budget: '0' is not a number of bits per weight" in done.stderr
    assert "Traceback" not in done.stderr
