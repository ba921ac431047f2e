"""Heads of large vocabularies: a chunk of logits at a time finds what all at once do."""

import mlx.core as mx
import mlx_lm
import pytest
from toy_fixtures import quiet, unmeasured
from toy_qwen3 import TEXT, write_toy

from mlx_optiq_ext.planning import Reference, Sampling
from mlx_optiq_ext.planning.parts import Parts
from mlx_optiq_ext.weights import plan_search, study
from mlx_optiq_ext.weights.sensitivity import draws, head
from mlx_optiq_ext.weights.sensitivity.fisher import factors
from mlx_optiq_ext.weights.sensitivity.kl import measured

pytestmark = pytest.mark.newest

TOKENS = mx.arange(96).reshape(3, 32) * 37 % 1000
PATHS = ("model.embed_tokens", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")
LARGE = 32_768


def gathered(model, parts):
    batches = [TOKENS[:2], TOKENS[2:]]
    return {path: f for block in factors(model, batches, parts=parts) for path, f in block.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_factors_are_those_of_all_logits_at_once(tmp_path, monkeypatch, tied):
    model = mlx_lm.load(str(write_toy(tmp_path / "toy", tie_word_embeddings=tied)))[0]
    model.set_dtype(mx.float32)
    # Chunks have draws of their own, so gradients that are not drawn are compared.
    fixed = lambda logits, *_: mx.sin(50 * logits)  # noqa: E731
    monkeypatch.setattr(draws, "score", fixed)
    monkeypatch.setattr(head, "score", fixed)
    parts = Parts.of(model, 1, 32, limit=4 * 1024 * 10)
    assert parts.tokens == 8
    whole, chunked = gathered(model, None), gathered(model, parts)
    assert whole.keys() == chunked.keys()
    for path in (*PATHS, *(() if tied else ("lm_head",))):
        arrays = whole[path].arrays()
        assert arrays.keys() == chunked[path].arrays().keys(), path
        for name, one in arrays.items():
            other = getattr(chunked[path], name)
            assert mx.allclose(one, other, rtol=1e-3, atol=1e-4 * float(mx.abs(one).max())), name


def test_a_chunk_draws_the_same_alone_and_in_its_batch(loaded):
    model = loaded[0]
    one = head.Head(Parts.of(model, 1, 32, limit=4 * 1024 * 10), 1)
    hidden = mx.random.normal((2, 32, 64))
    together = one.pulled(draws.Drawn(TOKENS[:2], 3, 0, 2), hidden, 0)
    alone = one.pulled(draws.Drawn(TOKENS[1:2], 3, 1, 2), hidden[1:], 0)
    assert mx.allclose(together[1:], alone, atol=1e-6)
    assert not mx.allclose(together[:1], alone, atol=1e-3)


def test_divergences_are_those_of_all_logits_at_once(loaded):
    model = loaded[0]
    whole, parts = (Parts.of(model, 1, 32, limit=limit) for limit in (1 << 30, 4 * 1024 * 7))
    assert (whole.fits(96), parts.fits(96), parts.tokens) == (True, False, 7)
    references = [Reference.run(each, TOKENS) for each in (whole, parts)]
    model.model.norm.weight = model.model.norm.weight * 1.5
    found = [r.compared(p, TOKENS) for r, p in zip(references, (whole, parts), strict=True)]
    assert found[0].shape == TOKENS.shape
    assert float(found[0].min()) > 1e-4
    assert mx.allclose(*found, rtol=1e-3, atol=1e-5)


def test_a_head_that_mixes_tokens_is_not_run_in_chunks(loaded, monkeypatch):
    model = loaded[0]
    assert Parts.of(model, 1, 32).recording is not None
    norm = type(model.model.norm).__call__
    mixing = lambda self, x: norm(self, x + x.mean(axis=1, keepdims=True))  # noqa: E731
    monkeypatch.setattr(type(model.model.norm), "__call__", mixing)
    assert Parts.of(model, 1, 32).recording is None


def test_memory_for_a_large_vocabulary_is_a_few_chunks_of_logits(tmp_path, text):
    folder = write_toy(tmp_path / "large", vocab_size=LARGE)
    text.write_text(TEXT * 60)
    model, tokenizer = mlx_lm.load(str(folder))[:2]
    sampling = Sampling(length=256, count=4, held_out_every=2)
    settings = {"calibration": text, "sampling": sampling, "bits": (3, 4), "group_sizes": (64,)}
    problem = unmeasured(model, tokenizer, **settings)
    chunk = 1 << 20
    problem.findings.parts = Parts.of(problem.model, 1, 256, limit=chunk)
    embedding = 4 * LARGE * 64
    logits = 4 * LARGE * 256  # of one sequence
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    made = study.Study(problem, quiet().sensitivity.measure(problem), "taylor")
    plan_search.search(made, 4.5)
    measured(problem, problem.tensors[:1])
    # Beside the chunks, the embedding's errors are computed in float32.
    assert mx.get_peak_memory() - before < 8 * chunk + 10 * embedding
    problem.findings.parts = Parts.of(problem.model, 1, 256, limit=1 << 30)
    mx.reset_peak_memory()
    plan_search.divergences(problem, [{}])
    assert mx.get_peak_memory() - before > 4 * logits
