"""``mlx_lm.evaluate --optiq-task`` as a command, with lm-eval and without."""

import importlib
import json
import os
import sys

import pytest

from mlx_optiq_hooks.patches import evaluate as patched

#: Runs the command in a process where lm-eval cannot be imported, if asked to.
MAIN = """
import sys
if sys.argv[1] == "without":
    sys.modules["lm_eval.api.model"] = sys.modules["lm_eval"] = None
del sys.argv[1]
import mlx_optiq_ext
from mlx_lm.evaluate import main
main()
"""


@pytest.fixture
def evaluate(run, tmp_path):
    def evaluate(*arguments, mode="with"):
        path = os.pathsep.join(sys.path)
        return run("python", "-c", MAIN, mode, *arguments, cwd=tmp_path, env={"PYTHONPATH": path})

    return evaluate


@pytest.mark.parametrize("mode", ["with", "without"])
def test_kl_writes_a_table_and_json(evaluate, tiny, packed, text, tmp_path, mode):
    done = evaluate(
        *("--model", packed, "--optiq-task", "kl", "--optiq-baseline", tiny),
        *("--optiq-data", text, "--optiq-context", "32", "--limit", "2", "--output-dir", "out"),
        mode=mode,
    )
    assert done.returncode == 0, done.stderr
    assert "| same top |" in done.stdout
    (path,) = (tmp_path / "out").glob("optiq_kl_*.json")
    (column,) = json.loads(path.read_text())["columns"].values()
    assert column["tokens"] == 62
    assert 0 < column["mean"] < 1
    assert path.with_suffix(".md").exists()


def test_perplexity_with_a_kv_plan(evaluate, tiny, text):
    options = ("--optiq-data", text, "--optiq-context", "64", "--limit", "1", "--optiq-kv", "4")
    done = evaluate("--model", tiny, "--optiq-task", "perplexity", *options)
    assert done.returncode == 0, done.stderr
    assert "(KV 4) against" in done.stdout


WRONG = [
    (("--optiq-task", "kl"), "--optiq-baseline"),
    (("--optiq-task", "kl", "--tasks", "arc"), "leave one of them out"),
    (("--optiq-task", "kl", "--optiq-data", "no.txt"), "no such file"),
    (("--optiq-task", "kl", "--optiq-context", "1"), "too short"),
    (("--optiq-task", "kl", "--limit", "0"), "leaves nothing"),
    (("--optiq-task", "kd"), "invalid choice"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_bad_input_ends_the_command(command, tiny, options, message):
    with patched.stand_ins():
        importlib.import_module("mlx_lm.evaluate")
    done = command("evaluate", "--model", tiny, *options)
    assert done.status == 2
    assert message in " ".join(done.err.split())


def test_gsm8k_without_lm_eval_names_the_extra(evaluate, tiny):
    done = evaluate("--model", tiny, "--optiq-task", "gsm8k", mode="without")
    assert done.returncode == 2
    assert "mlx-optiq-ext[eval]" in done.stderr


def test_the_stand_ins_are_gone_after_the_import(run):
    code = (
        "import sys; sys.argv = ['x', '--optiq-task', 'kl']\n"
        "import mlx_optiq_ext, mlx_lm.evaluate\n"
        "module = sys.modules['mlx_lm.evaluate']\n"
        "print(hasattr(module.lm_eval, 'simple_evaluate'), 'lm_eval' in sys.modules)"
    )
    done = run("python", "-c", code, env={"PYTHONPATH": os.pathsep.join(sys.path)}, check=True)
    assert done.stdout.split() == ["False", "False"]
