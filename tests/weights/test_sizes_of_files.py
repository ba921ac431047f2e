"""Budgets that are sizes: the files that mlx-lm writes are never larger."""

import json
import re

import mlx.core as mx
import mlx_lm
import pytest
from toy_fixtures import PLAIN, quiet
from toy_qwen3 import moe, write_toy

from mlx_optiq_ext.errors import BudgetError, OptiqError
from mlx_optiq_ext.weights import Budget, Size, check_written, plan_folder, tensors
from mlx_optiq_ext.weights.plan import Plan


def taken(folder) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def written(toy, plan, out) -> int:
    """What stock writes of a plan, in bytes."""
    default = plan.default
    settings = {"q_group_size": default.group_size, "q_bits": default.bits}
    predicate = plan.predicate()
    mlx_lm.convert(str(toy), str(out), quantize=True, quant_predicate=predicate, **settings)
    return taken(out)


@pytest.mark.parametrize("budget", ["75KB", "120KB", "90 KiB", "31.7%", "55%"])
def test_the_files_fill_a_budget_and_are_not_larger(toy, text, tmp_path, budget):
    found = plan_folder(str(toy), quiet(budget=Budget.parse(budget), calibration=text))
    assert found.limit is not None
    assert (found.budget, found.aim) == (budget, budget)
    size = written(toy, found, tmp_path / "out")
    check_written(tmp_path / "out", found)
    slack = found.limit - size
    assert 0 <= slack < 2500


@pytest.mark.parametrize("untied", [False, True])
def test_a_share_is_one_of_the_16_bit_files(tmp_path, untied):
    folder = write_toy(tmp_path / "model", tie_word_embeddings=not untied)
    model = mlx_lm.load(str(folder), lazy=True)[0]
    candidates = tensors(model)
    size = Size.of(model, candidates)
    assert 0 <= size.files.original - taken(folder) < 2000
    unquantized = sum(t.size * t.dtype_bits for t in candidates)
    assert size.file_bytes(unquantized) >= taken(folder)
    model.set_dtype(mx.float32)
    doubled = Size.of(model, tensors(model)).files.original
    assert 0 <= doubled - size.files.original < 2000
    limit = size.limit(Budget.parse("50%"))
    assert limit == size.files.original // 2


def test_experts_are_counted_as_they_are_written(tmp_path):
    from mlx_lm.utils import quantize_model, save_model

    model = moe()
    model.set_dtype(mx.bfloat16)
    candidates = tensors(model, (4,), (32,))
    size = Size.of(model, candidates)
    bits = sum(t.stored_bits(t.precisions[0]) for t in candidates)
    left = {t.path: t.precisions[0].settings for t in candidates}
    model, _ = quantize_model(
        model, {}, 32, 4, quant_predicate=lambda path, _: left.get(path, False)
    )
    save_model(tmp_path / "moe", model)
    assert 0 <= size.file_bytes(bits) - taken(tmp_path / "moe") < 1500


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("1MB", r"a budget of 1MB is more than the \d+\.\d+ KB that the weights of this model"),
        ("10KB", r"a budget of 10KB is too small for this model: .* from \d+\.\d+ KB to \d+\.\d+"),
        ("1%", r"a budget of 1% is too small for this model"),
    ],
)
def test_a_size_that_cannot_be_is_refused_before_anything_is_measured(
    command, toy, text, tmp_path, budget, said
):
    words = ("--hf-path", toy, "--mlx-path", tmp_path / "out", "--optiq-calibration", text)
    done = command("convert", *words, "--optiq-budget", budget)
    assert done.status == 2
    assert re.search(said, done.err.splitlines()[-1])
    assert done.err.count("mlx_lm.convert: error: ") == 1
    assert "Measuring" not in done.out + done.err
    assert not (tmp_path / "out").exists()


def test_the_least_size_in_the_message_is_a_budget(toy, text):
    with pytest.raises(BudgetError) as raised:
        plan_folder(str(toy), quiet(budget=Budget.parse("1KB"), calibration=text))
    found = re.search(r"takes from (\S+ KB) to", str(raised.value))
    assert found is not None
    plan = plan_folder(str(toy), quiet(budget=Budget.parse(found[1]), calibration=text))
    assert {p.bits for p in plan.precisions.values()} == {2}


@pytest.mark.parametrize("effort", ["plan", "refine"])
def test_the_command_keeps_a_size_and_says_it(command, toy, text, tmp_path, effort):
    out = tmp_path / "out"
    words = ("--hf-path", toy, "--mlx-path", out, "--optiq-calibration", text)
    done = command("convert", *words, "--optiq-budget", "100KB", "--optiq-effort", effort)
    assert done.status == 0, done.err
    assert 97_500 < taken(out) <= 100_000
    assert "bits per weight of a budget of 100KB: " in done.out
    metadata = json.loads((out / "optiq_metadata.json").read_text())
    assert metadata["budget"] == "100KB"
    assert metadata["target_bpw"] >= metadata["achieved_bpw"] - 1e-6


def test_a_size_holds_for_a_model_that_is_read_layer_by_layer(command, text, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_OPTIQ_EXT_STREAM", "1")
    out, deep = tmp_path / "out", write_toy(tmp_path / "deep", layers=6)
    words = ("--hf-path", deep, "--mlx-path", out, "--optiq-calibration", text, *PLAIN)
    done = command("convert", *words, "--optiq-budget", "30%")
    assert done.status == 0, done.err
    assert len(list(out.glob("*.safetensors"))) > 1
    original = taken(deep)
    assert 0.28 * original < taken(out) <= 0.31 * original


def test_files_that_are_larger_than_their_budget_are_noticed(toy, text, tmp_path):
    found = plan_folder(str(toy), quiet(budget=Budget.parse("90KB"), calibration=text))
    size = written(toy, found, tmp_path / "out")
    smaller = Plan(**{**vars(found), "limit": size - 1})
    with pytest.raises(OptiqError, match=r"of a budget of 90KB"):
        check_written(tmp_path / "out", smaller)


def test_a_detector_takes_bits_per_weight_only(command, tmp_path):
    words = ("--hf-path", tmp_path / "yolo26n.pt", "--optiq-model-type", "yolo")
    done = command("convert", *words, "--optiq-budget", "3MB", "--optiq-calibration", tmp_path)
    assert done.status == 2
    assert "takes no budget of 3MB: give one number of bits per weight" in done.err.splitlines()[-1]
