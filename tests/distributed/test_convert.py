"""``mlx_lm.convert`` on several ranks makes what one process makes."""

import json
import time
from functools import cache

import pytest
from toy_fixtures import PLAIN

from .test_failures import ALLOWED

pytestmark = pytest.mark.newest

PLANS = """
import json, sys
from functools import partial
from pathlib import Path
from mlx_optiq_ext import distributed
from mlx_optiq_ext.model.loading import load_unquantized, reload
from mlx_optiq_ext.weights import Request, search, study_model

model, calibration, method, settings, *budgets = sys.argv[1:]
loaded, tokenizer, digest = load_unquantized(model)
request = Request(
    calibration=Path(calibration), method=method, progress=False, say=lambda line: None,
    **{"effort": "plan", **json.loads(settings)},
)
study = study_model(loaded, tokenizer, request, digest=digest, load=partial(reload, model))
for budget in map(float, budgets):
    plan = search(study, budget)
    precisions = {path: str(precision) for path, precision in plan.precisions.items()}
    if distributed.leads():
        below = plan.below and plan.below.kl
        print(json.dumps([precisions, plan.sensitivities, plan.kl, below, plan.variant]))
"""

#: Name -> method, settings, budgets.
CASES = {
    "taylor": ("taylor", {}, (2.75, 4.5)),
    "streamed": ("taylor", {}, (4.5,)),
    "refined": ("taylor", {"effort": "refine"}, (3.0,)),
    "kl": ("kl", {"bits": [3, 4], "group_sizes": [64]}, (4.2,)),  # each candidate is a probe
}


@pytest.fixture(scope="module")
def words(tiny, calibration, short):
    """The command of a case, as words after ``python``."""

    def words(case):
        method, settings, budgets = CASES[case]
        text = short if method == "kl" else calibration
        yield from ("-c", PLANS, tiny, text, method, json.dumps(settings))
        yield from map(str, budgets)

    return words


@pytest.fixture(scope="module")
def alone(run, words, tmp_path_factory):
    """What one process prints for a case, and the folder where it keeps what it measured."""

    @cache
    def alone(case):
        folder = tmp_path_factory.mktemp("alone")
        env = {"MLX_OPTIQ_EXT_CACHE": str(folder)}
        return run("python", *words(case), env=env, check=True).stdout, folder

    return alone


@pytest.mark.parametrize(
    ("count", "case"), [(2, "taylor"), (4, "taylor"), (2, "refined"), (3, "kl")]
)
def test_plans_are_those_of_one_process(launch, words, alone, tmp_path, count, case):
    expected, folder = alone(case)
    done = launch(count, *words(case), env={"MLX_OPTIQ_EXT_CACHE": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        json.loads(line) for line in expected.splitlines()
    ]
    assert len(expected.splitlines()) == len(CASES[case][2])
    # One rank wrote what was measured, once.
    files = [sorted((where / "sensitivity").iterdir()) for where in (folder, tmp_path)]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    for one, other in zip(*files, strict=True):
        assert lines(one) == lines(other)


def lines(path):
    return sorted(line for line in path.read_text().splitlines() if line)


def test_a_model_read_layer_by_layer_is_planned_the_same(launch, words, alone, tmp_path):
    env = {"MLX_OPTIQ_EXT_CACHE": str(tmp_path), "MLX_OPTIQ_EXT_STREAM": "1"}
    done = launch(2, *words("streamed"), env=env)
    assert done.stdout.splitlines() == alone("taylor")[0].splitlines()[1:], done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judged", "sensitivity"]


def test_the_command_writes_the_same_files(launch, tiny, short, converted, tmp_path):
    words = ("--hf-path", tiny, "--mlx-path", tmp_path / "out", *PLAIN, "--optiq-budget", "3.5")
    words = (*words, "--optiq-calibration", short, "--dtype", "float32")
    report = ("--optiq-report", tmp_path / "page.html")
    cache = {"MLX_OPTIQ_EXT_CACHE": str(tmp_path / "cache")}
    done = launch(2, "-m", "mlx_lm", "convert", *words, *report, env=cache)
    assert done.returncode == 0, done.stderr
    assert same_files(converted, tmp_path / "out")
    assert done.stdout.count("[optiq] Planned in") == 1
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "page.html"]


def same_files(one, other) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return all(
        (one / name).read_bytes() == (other / name).read_bytes()
        for name in names
        if name != "README.md"
    )


def test_what_one_rank_finishes_is_what_one_process_makes(launch, run, tiny, short, tmp_path):
    def words(name):
        yield from ("--hf-path", tiny, "--mlx-path", tmp_path / name, "--dtype", "float32")
        yield from ("--optiq-budget", "4", "--optiq-calibration", short)
        yield from ("--optiq-bits", "3,4", "--optiq-effort", "refine")

    alone, many = ({"MLX_OPTIQ_EXT_CACHE": str(tmp_path / f"{n}-cache")} for n in ("1", "2"))
    run("mlx_lm.convert", *words("one"), env=alone, check=True)
    done = launch(2, "-m", "mlx_lm", "convert", *words("two"), env=many, timeout=300)
    assert done.returncode == 0, done.stderr
    assert same_files(tmp_path / "one", tmp_path / "two")


def test_a_forecast_is_that_of_one_process(launch, run, tiny, short, tmp_path):
    words = ("--hf-path", tiny, "--mlx-path", tmp_path / "out", "--dtype", "float32")
    words = (*words, "--optiq-budget", "4,5", "--optiq-calibration", short)
    words = (*words, *PLAIN, "--optiq-bits", "3,4")
    alone, many = ({"MLX_OPTIQ_EXT_CACHE": str(tmp_path / name)} for name in ("alone", "many"))
    tables = []
    for done in (
        run("mlx_lm.convert", *words, env=alone),
        launch(2, "-m", "mlx_lm", "convert", *words, env=many, timeout=300),
    ):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("[optiq] Nothing was converted") == 1
        first, rest = done.stdout.split("[optiq] budget ")
        assert "Measuring" in first
        tables.append(rest.split("[optiq] Planned")[0])
    assert tables[0] == tables[1]
    assert not (tmp_path / "out").exists()


def test_a_kv_plan_is_that_of_one_process(launch, run, converted, short, tmp_path):
    words = ("--hf-path", converted, "--optiq-kv-only", "--optiq-kv-budget", "4.0")
    words = (*words, "--optiq-calibration", short)
    alone, many = ({"MLX_OPTIQ_EXT_CACHE": str(tmp_path / name)} for name in ("alone", "many"))
    names, found = ("kv_config.json", "kv_sensitivity.json"), []
    try:
        for once in (
            lambda: run("mlx_lm.convert", *words, env=alone),
            lambda: launch(2, "-m", "mlx_lm", "convert", *words, env=many),
        ):
            done = once()
            assert done.returncode == 0, done.stderr
            found.append([(converted / name).read_text() for name in names])
            assert done.stdout.count("[optiq] KV plan") == 1
    finally:
        for name in names:
            (converted / name).unlink(missing_ok=True)
    assert found[0] == found[1]


DYING = """
import os, signal
from mlx_optiq_ext import distributed, hookimpl

class Dying:
    name, version, needs = "dying", 1, frozenset()

    def measure(self, problem):
        from mlx_optiq_ext.weights.sensitivity import taylor
        left = [3]
        def count(path, factors=None):
            left[0] -= 1
            if distributed.rank() == 1 and not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
        taylor.differentiate(problem, "", count)
        return taylor.Taylor().measure(problem)

@hookimpl
def optiq_sensitivity_methods():
    return [Dying()]
"""


def test_a_rank_killed_in_the_sweep_ends_the_conversion(launch, plugin, tiny, short, tmp_path):
    env = {**plugin({}, "dying", DYING), "MLX_OPTIQ_EXT_CACHE": str(tmp_path / "cache")}
    words = ("--hf-path", tiny, "--mlx-path", tmp_path / "out", *PLAIN, "--optiq-budget", "4")
    words = (*words, "--optiq-calibration", short, "--optiq-sensitivity", "dying")
    started = time.monotonic()
    done = launch(2, "-m", "mlx_lm", "convert", *words, env=env)
    assert time.monotonic() - started < ALLOWED
    assert "rank 0 " in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_another_calibration_text_on_one_rank_is_refused(apart, tiny, texts):
    def fill(folder, rank):
        (folder / "texts.txt").write_text("\n".join(texts)[rank * 100 : 4000])

    words = ("--hf-path", tiny, "--mlx-path", "out", *PLAIN, "--optiq-budget", "4")
    started = time.monotonic()
    done = apart(fill, "convert", *words, "--optiq-calibration", "texts.txt")
    assert time.monotonic() - started < ALLOWED
    assert done.stderr.count("the ranks do not have the same calibration data") == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written_ends_both_ranks(launch, tiny, short, tmp_path):
    (tmp_path / "file").touch()
    words = (
        "--hf-path",
        tiny,
        "--mlx-path",
        tmp_path / "file" / "out",
        *PLAIN,
        "--optiq-budget",
        "4",
    )
    done = launch(2, "-m", "mlx_lm", "convert", *words, "--optiq-calibration", short)
    assert done.stderr.count("cannot write beside") == 1, done.stderr
    assert "Traceback" not in done.stderr
