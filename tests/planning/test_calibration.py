import shutil
from dataclasses import replace
from urllib.error import URLError

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_fixtures import quiet
from toy_qwen3 import TEXT

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.planning.calibration import (
    DEFAULT,
    Calibration,
    Sampling,
    from_texts,
    load_calibration,
    load_tokens,
)
from mlx_optiq_ext.weights import plan_folder


def test_sequences_are_spread_over_the_whole_text(loaded):
    words = " ".join(f"apple {n}" for n in range(9000))
    data = from_texts([words], loaded[1], "words")
    assert data.tokens.shape == (DEFAULT.count, DEFAULT.length)
    assert "apple 8" in loaded[1].decode(data.tokens[-1].tolist())


def test_held_out_sequences_are_not_measured():
    data = Calibration(np.arange(8 * 4).reshape(8, 4), "numbers")
    assert len(data.measured) == 6
    assert len(data.held_out) == 2
    assert not set(data.measured.ravel()) & set(data.held_out.ravel())


@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 9), st.integers(1, 20))
def test_sequences_are_cut_as_asked_and_none_serves_twice(tokens, length, count, refining):
    class Counting:
        def encode(self, text):
            return list(range(tokens))

    sampling = Sampling(length, count, held_out_every=3, refining=refining)
    data = from_texts(["text"], Counting(), "numbers", sampling)
    own = min(length, max(tokens // 3, 2))  # of a short text one sequence is held out too
    available = tokens // own
    assert data.tokens.shape == (min(count, available), own)
    further = 0 if data.more is None else len(data.more)
    assert further == max(min(refining, available) - len(data.tokens), 0)
    every = data.tokens.ravel().tolist() + ([] if data.more is None else data.more.ravel().tolist())
    assert len(every) == len(set(every))
    assert data.holds_out == (len(data.tokens) >= 3)
    if tokens >= 6 and count >= 3:
        assert data.holds_out
    if data.holds_out:
        assert not set(data.refining.ravel()) & set(data.held_out.ravel())


def test_a_single_sequence_serves_both():
    data = Calibration(np.arange(4).reshape(1, 4), "numbers")
    assert (data.measured == data.held_out).all()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder of its own, and no network."""

    def offline(*args):
        raise URLError("no route to host")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlretrieve", offline)
    return tmp_path


def test_the_stock_text_is_used_when_it_is_cached(loaded, home):
    cached = home / ".cache" / "mlx-lm" / "calibration_v5.txt"
    cached.parent.mkdir(parents=True)
    cached.write_text("Mia buys 7 boxes. " * 50)
    assert load_calibration(loaded[0], loaded[1], None).source == "mlx-lm"


def drawn(length):
    """Tokens of a sampled sequence: drawing them is slow on a CPU."""
    return length // 2 if mx.default_device() == mx.Device(mx.cpu) else length


def test_without_any_text_the_model_is_sampled(loaded, home):
    said, sampling = [], Sampling(length=16, count=5)
    data = load_calibration(loaded[0], loaded[1], None, said.append, sampling)
    assert data.tokens.shape == (5, drawn(16))
    assert data.source == "sampled from the model"
    (line,) = said
    assert "no route to host" in line
    assert "--optiq-calibration" in line
    again = load_calibration(loaded[0], loaded[1], None, said.append, sampling)
    assert data.digest == again.digest


def test_more_text_is_sampled_to_refine_on(loaded, home):
    sampling = Sampling(length=16, count=5, refining=12)
    data = load_calibration(loaded[0], loaded[1], None, lambda line: None, sampling, refining=True)
    assert data.tokens.shape == (5, drawn(16))
    assert data.more is not None
    assert data.more.shape == (7, drawn(16))


@pytest.mark.parametrize("read", [load_calibration, load_tokens])
def test_a_text_of_few_tokens_is_refused_and_a_short_one_warned_of(loaded, tmp_path, read):
    path, said = tmp_path / "some.txt", []
    path.write_text(TEXT * 10)
    with pytest.raises(InputError, match=r"text \(some\.txt\) has 2\d\d tokens, too few"):
        read(*loaded, path, said.append)
    assert said == []
    path.write_text(TEXT * 12)
    read(*loaded, path, said.append)
    (line,) = said
    assert "Warning: the calibration text (some.txt) has 267 tokens" in line
    path.write_text(TEXT * 120)
    read(*loaded, path, said.append)
    assert len(said) == 1


def test_without_a_sequence_to_judge_on_nothing_is_measured(loaded, text):
    sampling = Sampling(length=32, count=3)
    model, tokenizer = loaded
    with pytest.raises(InputError, match=r"one in 4 of which is held out .* leave none"):
        load_calibration(model, tokenizer, text, sampling=sampling)
    assert load_calibration(model, tokenizer, text).holds_out


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("read", [load_calibration, load_tokens])
def test_a_model_without_a_tokenizer_is_said_to_have_none(toy, text, home, tmp_path, read, given):
    bare = tmp_path / "bare"
    shutil.copytree(toy, bare)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=f"^{bare} has no tokenizer, which reading a text needs"):
        read(*mlx_lm.load(str(bare))[:2], text if given else None)


def test_a_tokenizer_that_cannot_be_made_is_said_to_be_missing(toy, text, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(toy, bare)
    (bare / "tokenizer.json").unlink()  # its config stays
    with pytest.raises(InputError, match=f"^{bare} has no tokenizer: put its tokenizer files"):
        plan_folder(str(bare), quiet(budget=4.0, calibration=text))


def test_a_text_that_upstream_keeps_elsewhere_is_missed_in_one_line(loaded, home, monkeypatch):
    monkeypatch.setattr("mlx_lm.quant.utils.load_data", lambda *_: None)
    said = []
    tokens, source = load_tokens(loaded[0], loaded[1], None, said.append)
    assert source == "sampled from the model"
    assert tokens.shape == (DEFAULT.count * drawn(DEFAULT.length),)
    (line,) = said
    assert "does not keep it in" in line


def test_text_of_the_models_own_stands_beside_a_file_to_refine_on(loaded, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The cat sat on the mat and looked at the moon over the hills. " * 200)
    sampling = Sampling(length=16, count=8, refining=24, beside=6)
    model, tokenizer = loaded[:2]

    def read(**asked):
        return load_calibration(model, tokenizer, path, lambda line: None, **asked)

    alone = read(sampling=replace(sampling, beside=0, refining=18), refining=True)
    both = read(sampling=sampling, refining=True)
    assert np.array_equal(both.tokens, alone.tokens)
    assert both.more is not None
    assert alone.more is not None
    assert np.array_equal(both.more[:-6], alone.more)
    assert both.more.shape == (16, 16)
    assert not np.array_equal(both.more[-6:], alone.more[-6:])
    unrefined = read(sampling=sampling)
    assert unrefined.digest == both.digest
    assert unrefined.more is not None
    assert len(unrefined.more) == 16


@pytest.mark.parametrize("from_file", [True, False])
def test_further_text_of_the_models_own_is_for_distillation_only(loaded, tmp_path, from_file):
    path = tmp_path / "text.txt"
    path.write_text("The cat sat on the mat and looked at the moon over the hills. " * 200)
    model, tokenizer = loaded[:2]

    def read(**asked):
        sampling = Sampling(length=16, count=8, refining=12, beside=2, further=5)
        file = path if from_file else None
        return load_calibration(model, tokenizer, file, lambda line: None, sampling, **asked)

    refined, distilled = read(refining=True), read(refining=True, distilling=True)
    assert refined.further is None
    assert np.array_equal(refined.distilling, refined.refining)
    assert np.array_equal(distilled.refining, refined.refining)
    assert np.array_equal(distilled.distilling[:-5], refined.refining)
    assert distilled.further is not None
    assert distilled.further.shape == (5, refined.tokens.shape[1])
    known = {row.tobytes() for row in refined.refining}
    assert any(row.tobytes() not in known for row in distilled.further)
    assert distilled.digest == refined.digest
    assert distilled.whole_digest != refined.whole_digest
