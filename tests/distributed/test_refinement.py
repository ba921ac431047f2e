"""Refinement on several ranks stores what one process stores, bit for bit."""

import json
from pathlib import Path

import pytest
from toy_qwen3 import write_toy

from .test_failures import START, TOLD, outcomes

pytestmark = pytest.mark.newest

REFINE = """
import hashlib, json, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import mlx_lm
import numpy as np
from toy_fixtures import unmeasured
from toy_qwen3 import moe
from mlx_optiq_ext.planning.calibration import Sampling
from mlx_optiq_ext.weights import Precision, refine
from mlx_optiq_ext.weights.rounding.refinement import judge

def problem(kind):
    model, tokenizer = mlx_lm.load(sys.argv[2])[:2]
    model = moe() if kind == "experts" else model
    text, sampling = Path(sys.argv[3]), Sampling(length=32, count=10, refining=10)
    return unmeasured(model, tokenizer, calibration=text, sampling=sampling, effort="refine")

def precisions(found):
    return {t.path: Precision(2 + n % 3, 32 << n % 2) for n, t in enumerate(found.tensors)}
"""

STORED = """
for kind in ("dense", "experts"):
    found = problem(kind)
    plan = precisions(found)
    values = refine(found, plan)
    digest = hashlib.sha256()
    for path in sorted(values):
        for array in values[path]:
            digest.update(bytes(memoryview(np.array(array.view(mx.uint8)))))
    line = json.dumps([kind, len(values), digest.hexdigest(), judge(found, plan, values)])
    sys.stdout.write(line + "\\n")
    sys.stdout.flush()
"""

DISTILLED = """
from mlx_optiq_ext.weights import Request, prepare
from mlx_optiq_ext.weights.rounding.distillation import Settings

done = prepare(sys.argv[2], Request(
    budget=4.5, bits=(3, 4), calibration=Path(sys.argv[3]), effort="distill", progress=False,
    sampling=Sampling(length=32, count=10, refining=10), say=lambda line: None,
    distillation=Settings(steps=2, batch=2, seconds=None),
), dtype="float32")
if distributed.leads():
    values = [array for path in sorted(done.refined) for array in done.refined[path]]
    values += [done.parameters[path] for path in sorted(done.parameters)]
    digest = hashlib.sha256(b"".join(np.array(a).tobytes() for a in values)).hexdigest()
    print(json.dumps([digest, done.plan.kl, done.post_processing]))
"""

FAILING = """
class Gone(dict):
    def __getitem__(self, path):
        if rank == 1 and path.endswith("layers.1.mlp.down_proj"):
            raise InputError("the disk is full")
        return super().__getitem__(path)

def run():
    found = problem("dense")
    refine(replace(found, weights=Gone(found.weights)), precisions(found))
"""

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def words(calibration, tmp_path_factory):
    """What comes after the code: the tests' folder, a toy model and calibration text."""
    return TESTS, write_toy(tmp_path_factory.mktemp("models") / "toy"), calibration


def test_every_rank_has_what_one_process_stores(launch, run, words):
    alone = run("python", "-c", START + REFINE + STORED, *words, check=True).stdout.splitlines()
    assert [json.loads(line)[0] for line in alone] == ["dense", "experts"]
    for count in (2, 3):
        done = launch(count, "-c", START + REFINE + STORED, *words)
        assert done.returncode == 0, done.stderr
        found = [line for line in done.stdout.splitlines() if line.startswith("[")]
        assert sorted(found) == sorted(alone * count)


def test_what_the_first_rank_distills_is_what_one_process_distills(launch, run, words, tmp_path):
    code, folders = START + REFINE + DISTILLED, (tmp_path / "one", tmp_path / "two")
    one, two = ({"MLX_OPTIQ_EXT_CACHE": str(folder)} for folder in folders)
    alone = run("python", "-c", code, *words, env=one, check=True).stdout.splitlines()
    done = launch(2, "-c", code, *words, env=two)
    assert done.returncode == 0, done.stderr
    assert [step["op"] for step in json.loads(alone[-1])[2]] == ["refine", "distill"]
    assert done.stdout.splitlines()[-1] == alone[-1]


def test_an_error_while_one_rank_refines_ends_all(launch, words):
    done = launch(2, "-c", START + REFINE + FAILING + TOLD, *words)
    told = "Failed: on rank 1: the disk is full"
    assert outcomes(done, 2) == [f"{n}: {told}" for n in range(2)], done.stderr
