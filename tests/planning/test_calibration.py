import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.planning import calibration
from mlx_optiq_ext.planning.calibration import (
    DEFAULT,
    Calibration,
    Sampling,
    from_texts,
    load_calibration,
    read_texts,
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


def test_all_json_lines_forms_are_read(tmp_path):
    path = tmp_path / "data.jsonl"
    records = [
        {"text": "plain"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"prompt": "a", "completion": "b"},
        {"question": "c", "answer": "d"},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    texts = read_texts(path)
    assert texts[0] == "plain"
    assert [len(t) for t in texts[1:]] == [1, 2, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\xff\xfe\x00bad", "cannot read"),
        ("a.jsonl", b'{"text": "ok"}\n{broken', "line 2 is not JSON"),
        ("a.jsonl", b'{"other": 1}', "line 1 has no text"),
        ("a.jsonl", b"[1, 2]", "line 1 has no text"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_texts(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot read the calibration file"):
        read_texts(tmp_path / "none.txt")


def test_the_stock_text_is_used_when_it_is_cached(loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cached = tmp_path / ".cache" / "mlx-lm" / "calibration_v5.txt"
    cached.parent.mkdir(parents=True)
    cached.write_text("Mia buys 7 boxes. " * 50)
    data = load_calibration(loaded[0], loaded[1], None)
    assert data.source == "mlx-lm"


def test_without_any_text_the_model_is_sampled(loaded, monkeypatch):
    monkeypatch.setattr(calibration, "stock_text", lambda: None)
    said, sampling = [], Sampling(length=16, count=5)
    data = load_calibration(loaded[0], loaded[1], None, said.append, sampling)
    assert data.tokens.shape == (5, 8)
    assert len(said) == 1
    assert "--optiq-calibration" in said[0]
    again = load_calibration(loaded[0], loaded[1], None, said.append, sampling)
    assert data.digest == again.digest
