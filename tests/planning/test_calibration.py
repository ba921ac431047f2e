from urllib.error import URLError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_optiq_ext.planning.calibration import (
    DEFAULT,
    Calibration,
    Sampling,
    from_texts,
    load_calibration,
    load_tokens,
)


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
    available = tokens // min(length, tokens)
    assert data.tokens.shape == (min(count, available), min(length, tokens))
    further = 0 if data.more is None else len(data.more)
    assert further == max(min(refining, available) - len(data.tokens), 0)
    every = data.tokens.ravel().tolist() + ([] if data.more is None else data.more.ravel().tolist())
    assert len(every) == len(set(every))
    assert data.holds_out == (len(data.tokens) >= 3)
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


def test_without_any_text_the_model_is_sampled(loaded, home):
    said, sampling = [], Sampling(length=16, count=5)
    data = load_calibration(loaded[0], loaded[1], None, said.append, sampling)
    assert data.tokens.shape == (5, 8)
    assert data.source == "sampled from the model"
    (line,) = said
    assert "no route to host" in line
    assert "--optiq-calibration" in line
    again = load_calibration(loaded[0], loaded[1], None, said.append, sampling)
    assert data.digest == again.digest


def test_a_text_that_upstream_keeps_elsewhere_is_missed_in_one_line(loaded, home, monkeypatch):
    monkeypatch.setattr("mlx_lm.quant.utils.load_data", lambda *_: None)
    said = []
    tokens, source = load_tokens(loaded[0], loaded[1], None, said.append)
    assert source == "sampled from the model"
    assert tokens.shape == (DEFAULT.count * DEFAULT.length // 2,)
    (line,) = said
    assert "does not keep it in" in line
