"""Tokens that a model has no embedding of are refused before it looks them up."""

import importlib

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.tuner.utils import linear_to_lora_layers
from toy_qwen3 import TEXT, write_toy

from mlx_optiq_ext import evaluation, kv
from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.evaluation import token_divergence
from mlx_optiq_ext.evaluation.harness import generated
from mlx_optiq_ext.lora.residual import start_from_residual
from mlx_optiq_ext.model.vocabulary import check_tokens, embedding_rows
from mlx_optiq_ext.planning.calibration import Sampling, sampled

REFUSED = r"the tokenizer makes token \d+ of the text, and the model's embedding has 100 rows: take"


@pytest.fixture
def narrow(tmp_path):
    """A model with fewer rows in its embedding than its tokenizer has tokens."""
    return write_toy(tmp_path / "narrow", vocab_size=100)


@pytest.fixture
def words(tmp_path):
    """Options of a conversion."""
    text = tmp_path / "calibration.txt"
    text.write_text(TEXT * 100)
    return ("--mlx-path", tmp_path / "out", "--optiq-calibration", text)


@pytest.mark.parametrize("budget", ["--optiq-budget", "--optiq-kv-budget"])
def test_calibration_text_is_refused(command, narrow, words, tmp_path, budget):
    done = command("convert", "--hf-path", narrow, *words, budget, 5)
    assert done.status == 2
    assert "has 100 rows: take the tokenizer that belongs to this model" in done.err
    assert len(done.err.splitlines()[-1]) < 300
    assert not (tmp_path / "out").exists()


def test_text_to_evaluate_on_is_refused(narrow):
    subject = evaluation.subject(str(narrow))
    with pytest.raises(InputError, match=REFUSED):
        token_divergence.compare(subject, subject, np.full((2, 8), 900), progress=False)
    model, tokenizer = mlx_lm.load(str(narrow))[:2]
    with pytest.raises(InputError, match=REFUSED):
        generated(model, tokenizer, [TEXT], 4, special=False)


def test_text_of_perplexity_is_refused(narrow):
    model = mlx_lm.load(str(narrow))[0]
    perplexity = importlib.import_module("mlx_lm.perplexity")
    plan = kv.parse_spec("8")
    assert plan is not None
    kv.mount(model, plan)
    assert perplexity.eval_ppl(model, mx.zeros((2, 8), mx.int32))
    with pytest.raises(InputError, match=REFUSED):
        perplexity.eval_ppl(model, mx.full((2, 8), 900))


def test_text_that_weights_a_residual_is_refused(narrow, tmp_path):
    quantized = tmp_path / "quantized"
    mlx_lm.convert(str(narrow), str(quantized), quantize=True, q_group_size=32)
    model, original = (mlx_lm.load(str(path))[0] for path in (quantized, narrow))
    linear_to_lora_layers(model, 1, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    layers = {path: m for path, m in model.named_modules() if "lora_a" in m}
    with pytest.raises(InputError, match=REFUSED):
        start_from_residual(model, layers, original, [[3, 100]])


def test_text_that_a_model_makes_begins_with_tokens_of_its_own(narrow):
    model, tokenizer = mlx_lm.load(str(narrow))[:2]
    assert sampled(model, tokenizer, Sampling(length=8, count=64)).tokens.max() < 100


def test_rows_of_a_packed_embedding_are_counted(narrow, tmp_path):
    quantized = tmp_path / "quantized"
    mlx_lm.convert(str(narrow), str(quantized), quantize=True, q_group_size=32)
    model = mlx_lm.load(str(quantized))[0]
    assert embedding_rows(model) == 100
    check_tokens(model, mx.array([[0, 99]]))
    for wrong in ([-1], [[5, 100]]):
        with pytest.raises(InputError, match="has 100 rows"):
            check_tokens(model, wrong)
