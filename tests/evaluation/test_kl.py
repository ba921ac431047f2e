"""KL and perplexity against direct computations in float64, and what is refused."""

import dataclasses
import json
import math
import shutil
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_map
from toy_qwen3 import write_toy

from mlx_optiq_ext import evaluation
from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.evaluation import models, token_divergence
from mlx_optiq_ext.evaluation.journal import Journal
from mlx_optiq_ext.evaluation.models import tokenizer_of
from mlx_optiq_ext.evaluation.texts import sequences
from mlx_optiq_ext.kv import parse_spec

from .conftest import PROBLEMS

QUIET = evaluation.Settings(progress=False)


def log_probs(folder, tokens) -> np.ndarray:
    """Log-probabilities of whole sequences in float64, from logits in float32."""
    model: Any = mlx_lm.load(str(folder))[0]
    model.update(tree_map(lambda a: a.astype(mx.float32) if a.dtype == mx.bfloat16 else a,
                          model.parameters()))  # fmt: skip
    from mlx_lm.utils import dequantize_model

    logits = np.array(dequantize_model(model)(mx.array(tokens))).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture
def tokens(tiny):
    return sequences(PROBLEMS[:30], tokenizer_of(evaluation.subject(str(tiny))), 64, 4)


def test_figures_are_those_of_float64(tiny, packed, tokens):
    model, reference = (evaluation.subject(str(path)) for path in (packed, tiny))
    found = token_divergence.compare(model, reference, tokens, progress=False)
    p, q = log_probs(tiny, tokens)[:, :-1], log_probs(packed, tokens)[:, :-1]
    each = (np.exp(p) * (p - q)).sum(-1)
    following = tokens[:, 1:, None].astype(np.int64)
    own = np.take_along_axis(q, following, -1)[..., 0]
    theirs = np.take_along_axis(p, following, -1)[..., 0]
    expected = {
        "mean": each.mean(),
        "median": np.quantile(each, 0.5),
        "p90": np.quantile(each, 0.9),
        "p95": np.quantile(each, 0.95),
        "p99": np.quantile(each, 0.99),
        "p99.9": np.quantile(each, 0.999),
        "max": each.max(),
        "same_top": 100 * (p.argmax(-1) == q.argmax(-1)).mean(),
        "probability_change": 100 * (np.exp(own) - np.exp(theirs)).mean(),
        "rms_probability_change": 100 * np.sqrt(((np.exp(own) - np.exp(theirs)) ** 2).mean()),
        "perplexity_ratio": math.exp((theirs - own).mean()),
    }
    assert found["tokens"] == each.size
    assert found["mean"] > 1e-4
    # Logits of about 20 in float32 carry 1e-6 of error each.
    assert found["mean"] == pytest.approx(expected["mean"], abs=1e-6)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
    assert found["perplexity"] == pytest.approx(math.exp(-own.mean()), rel=1e-5)


def test_long_sequences_go_through_the_cache_in_pieces(tiny, packed, tokens, monkeypatch):
    model, reference = (evaluation.subject(str(path)) for path in (packed, tiny))
    whole = token_divergence.compare(model, reference, tokens[:2], progress=False)
    monkeypatch.setenv("MLX_OPTIQ_EXT_CACHE", str(packed.parent / "another-cache"))
    pieces = token_divergence.compare(model, reference, tokens[:2], chunk=7, progress=False)
    assert pieces == pytest.approx(whole, rel=1e-3, abs=1e-5, nan_ok=True)


def test_a_large_vocabulary_is_a_lower_bound(tiny, packed, tokens):
    model, reference = (evaluation.subject(str(path)) for path in (packed, tiny))
    exact = token_divergence.compare(model, reference, tokens[:1], progress=False)
    bound = token_divergence.compare(model, reference, tokens[:1], top=64, progress=False)
    assert 0.5 * exact["mean"] < bound["mean"] <= exact["mean"] + 1e-7
    assert bound["same_top"] == exact["same_top"]
    assert bound["perplexity"] == pytest.approx(exact["perplexity"])


def test_an_interrupted_run_goes_on_and_a_finished_one_loads_nothing(
    tiny, packed, tokens, monkeypatch
):
    model, reference = (evaluation.subject(str(path)) for path in (packed, tiny))
    real, judged = Journal.put_arrays, []

    def interrupted(journal, name, **arrays):
        if name.startswith("sequence"):
            judged.append(1)
            if len(judged) == 3:
                raise KeyboardInterrupt
        real(journal, name, **arrays)

    monkeypatch.setattr(Journal, "put_arrays", interrupted)
    with pytest.raises(KeyboardInterrupt):
        token_divergence.compare(model, reference, tokens, progress=False)
    found = token_divergence.compare(model, reference, tokens, progress=False)
    assert len(judged) == 3 + len(tokens) - 2
    monkeypatch.setattr(models.Subject, "load", lambda self: pytest.fail("loaded again"))
    assert token_divergence.compare(model, reference, tokens, progress=False) == found


@pytest.mark.parametrize("task", ["kl", "perplexity"])
def test_a_baseline_that_computes_nan_is_named(tiny, text, tmp_path, task):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    path = str(broken / "model.safetensors")
    tensors = mx.load(path)
    assert isinstance(tensors, dict)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * mx.nan
    mx.eval(tensors)
    mx.save_safetensors(path, tensors, {"format": "mlx"})
    good, bad = (evaluation.subject(str(each)) for each in (tiny, broken))
    settings = evaluation.Settings(data=text, context=32, limit=1, progress=False)
    for first, second in ((good, bad), (bad, good)):
        with pytest.raises(InputError, match=r"broken computes NaN in sequence 1 of the data"):
            evaluation.TASKS[task](first, [second], settings)


def test_another_data_set_or_setting_has_files_of_its_own(tiny, packed, text, tmp_path):
    model, baseline = (evaluation.subject(str(path)) for path in (packed, tiny))
    other = tmp_path / "elsewhere" / text.name
    other.parent.mkdir()
    other.write_text(text.read_text() + " more")
    same = tmp_path / "copy.txt"
    same.write_text(text.read_text())
    settings = evaluation.Settings(data=text, context=32)
    digest = settings.digest([model, baseline])
    assert dataclasses.replace(settings, data=same).digest([model, baseline]) == digest
    assert dataclasses.replace(settings, batch_size=2).digest([model, baseline]) == digest
    changed = [
        dataclasses.replace(settings, data=other).digest([model, baseline]),
        dataclasses.replace(settings, context=64).digest([model, baseline]),
        dataclasses.replace(settings, limit=3).digest([model, baseline]),
        settings.digest([model]),
    ]
    assert len({digest, *changed}) == 5


def test_a_model_against_itself_is_zero(tiny, tokens):
    model = evaluation.subject(str(tiny))
    found = token_divergence.compare(model, model, tokens[:2], progress=False)
    assert abs(found["mean"]) < 1e-7
    assert found["same_top"] == 100
    assert found["perplexity_ratio"] == 1


def test_any_number_of_baselines_and_their_sizes(tiny, packed, text):
    model = evaluation.subject(str(packed))
    baselines = [evaluation.subject(str(tiny)), model]
    settings = evaluation.Settings(data=text, context=32, limit=2, progress=False)
    report = evaluation.TASKS["kl"](model, baselines, settings)
    assert len(report.columns) == 2
    first, second = report.columns.values()
    assert first["stored_bpw"] == pytest.approx(5.0, abs=0.05)
    assert first["baseline_stored_bpw"] == 16
    assert first["file_bytes"] == (packed / "model.safetensors").stat().st_size
    assert float(second["mean"]) == pytest.approx(0, abs=1e-7)


def test_another_tokenizer_is_refused_with_the_reason(tiny, tmp_path, text):
    other = write_toy(tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 1023, "content": "<new>"})
    (other / "tokenizer.json").write_text(json.dumps(content))
    settings = evaluation.Settings(data=text, progress=False)
    for task in ("kl", "perplexity"):
        with pytest.raises(InputError, match=r"other cannot be the baseline.*different"):
            evaluation.TASKS[task](
                evaluation.subject(str(tiny)), [evaluation.subject(str(other))], settings
            )


def test_missing_parts_are_named(tiny, text, tmp_path):
    model = evaluation.subject(str(tiny))
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(InputError, match="--optiq-baseline"):
        evaluation.TASKS["kl"](model, [], evaluation.Settings(data=text))
    with pytest.raises(InputError, match="--optiq-data"):
        evaluation.TASKS["kl"](model, [model], QUIET)
    with pytest.raises(InputError, match=r"data file .*empty\.txt is empty"):
        evaluation.TASKS["perplexity"](model, [], evaluation.Settings(data=empty))
    with pytest.raises(InputError, match="no config"):
        evaluation.subject(str(tmp_path))
    with pytest.raises(InputError, match="folder or a Hub repository"):
        evaluation.subject("./nowhere")


def test_perplexity_with_a_kv_plan_and_without(tiny, packed, text):
    plan = parse_spec("2")
    model = evaluation.subject(str(tiny), plan)
    settings = evaluation.Settings(data=text, context=96, limit=2, progress=False)
    report = evaluation.TASKS["perplexity"](model, [evaluation.subject(str(packed))], settings)
    names = list(report.columns)
    assert names[0] == f"{tiny} (KV 2)"
    assert names[1:3] == [str(tiny), f"{tiny} (KV 2) against {tiny}"]
    with_plan, without = (float(report.columns[n]["perplexity"]) for n in names[:2])
    ratio = report.columns[names[2]]["perplexity_ratio"]
    assert with_plan != without
    assert ratio == pytest.approx(with_plan / without)
    tokens = sequences(PROBLEMS, tokenizer_of(model), 96)
    rows = sequences([text.read_text()], tokenizer_of(model), 96, 2)
    assert tokens.shape[1] == rows.shape[1]
    p = log_probs(tiny, rows)[:, :-1]
    loss = -np.take_along_axis(p, rows[:, 1:, None].astype(np.int64), -1).mean()
    assert without == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_model_without_a_tokenizer_is_said_to_have_none(tiny, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=f"^{bare} has no tokenizer"):
        tokenizer_of(evaluation.subject(str(bare)))
