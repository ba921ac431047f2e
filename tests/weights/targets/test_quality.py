"""The smallest model that is near enough to the original."""

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from toy_fixtures import quiet

from mlx_optiq_ext.errors import BudgetError, InputError
from mlx_optiq_ext.planning import Sampling
from mlx_optiq_ext.weights import prepare
from mlx_optiq_ext.weights.targets import quality

SAMPLING = Sampling(length=32, count=64, held_out_every=2, refining=64, beside=0)
DATA = Path(__file__).parents[2] / "data"


@pytest.fixture
def text() -> Path:
    return DATA / "calibration.jsonl"


def made(toy, text, say=lambda line: None, **settings):
    return prepare(str(toy), quiet(calibration=text, sampling=SAMPLING, say=say, **settings))


def bounds(said):
    """Bits per weight and the bound of each conversion that was tried."""
    lines = [line for line in said if "bits per weight: KL" in line]
    words = [line.split() for line in lines]
    return [(float(w[1]), float(w[w.index("most") + 1])) for w in words]


@pytest.mark.parametrize("effort", ["plan", "refine"])
@pytest.mark.parametrize("wanted", [0.002, 0.05])
def test_the_smallest_that_is_near_enough_is_made(toy, text, effort, wanted):
    said: list[str] = []
    done = made(toy, text, said.append, effort=effort, max_kl=wanted)
    certificate = done.plan.certificate
    assert certificate is not None
    assert 0 <= certificate["kl"] <= certificate["kl_bound"] <= wanted
    tried = bounds(said)
    assert 2 <= len(tried) <= quality.MOST
    near = [bits for bits, bound in tried if bound <= wanted]
    far = [bits for bits, bound in tried if bound > wanted]
    assert done.plan.achieved_bpw == pytest.approx(min(near), abs=1e-3)
    if len(tried) < quality.MOST:
        assert min(near) - max(far) < 2 * quality.STEP
    assert "95% confidence" in said[-1] or "95% confidence" in said[-2]


def test_what_is_certified_is_measured_on_text_that_nothing_was_made_of(toy, text):
    done = made(toy, text, effort="refine", max_kl=0.01)
    certificate, study = done.plan.certificate, done.study
    assert certificate is not None
    assert study is not None
    data = study.problem.calibration
    assert certificate["sequences"] == len(data.held_out) == 32
    assert certificate["tokens"] == data.held_out.size
    used = {row.tobytes() for row in data.distilling}
    assert used.isdisjoint(row.tobytes() for row in data.held_out)
    assert list(certificate["kl_by_kind"]) == [text.name, "sampled from the model"]
    assert certificate["kl_by_kind"][text.name] == certificate["kl"]
    assert 0 < certificate["same_top_token"] <= 1
    assert certificate["kl_99th_percentile"] > certificate["kl"]
    assert len(certificate["text_sha256"]) == 64
    assert certificate["model"]


def test_any_distance_is_met_by_the_smallest(toy, text):
    said: list[str] = []
    done = made(toy, text, said.append, max_kl=1e3)
    assert len(bounds(said)) == 1
    assert done.plan.achieved_bpw < 2.6


def test_a_distance_out_of_reach_is_said(toy, text):
    with pytest.raises(
        BudgetError, match=r"a KL of 1e-07 .* out of reach: at .* more --optiq-bits"
    ):
        made(toy, text, max_kl=1e-7, bits=(2, 3))


def test_a_distance_that_cannot_be_is_refused(toy, text):
    with pytest.raises(InputError, match="give one above 0"):
        made(toy, text, max_kl=0.0)


def test_little_text_is_refused(toy, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("Mia buys 7 boxes of 12 pens and gives 9 of them to Tom. " * 40)
    with pytest.raises(InputError, match="needs 16 held-out sequences"):
        prepare(str(toy), quiet(calibration=few, max_kl=0.1))


def test_the_command_writes_a_certificate(command, toy, text, tmp_path):
    out, longer = tmp_path / "out", tmp_path / "longer.jsonl"
    longer.write_text(2 * text.read_text())
    done = command(
        *("convert", "--hf-path", toy, "--mlx-path", out, "--optiq-calibration", longer),
        *("--optiq-max-kl", "0.05", "--optiq-effort", "plan"),
    )
    assert done.status == 0, done.err
    written = json.loads((out / "optiq_metadata.json").read_text())
    assert written["certificate"]["kl_bound"] <= 0.05
    assert "with 95% confidence at most" in done.out
    model, tokenizer = mlx_lm.load(str(out))[:2]
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()
    assert tokenizer.vocab_size
