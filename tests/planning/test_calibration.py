import json

import numpy as np
import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.planning import calibration
from mlx_optiq_ext.planning.calibration import Calibration, from_texts, read_texts
from mlx_optiq_ext.weights import study as planning


def test_windows_are_spread_over_the_whole_text(loaded):
    words = " ".join(f"apple {n}" for n in range(9000))
    data = from_texts([words], loaded[1], "words")
    assert data.tokens.shape == (calibration.COUNT, calibration.WINDOW)
    assert "apple 8" in loaded[1].decode(data.tokens[-1].tolist())


def test_held_out_windows_are_not_measured():
    data = Calibration(np.arange(8 * 4).reshape(8, 4), "numbers")
    assert len(data.measured) == 6
    assert len(data.held_out) == 2
    assert not set(data.measured.ravel()) & set(data.held_out.ravel())


def test_a_single_window_serves_both():
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
    data = planning.load_calibration(loaded[0], loaded[1], None)
    assert data.source == "mlx-lm"


def test_without_any_text_the_model_is_sampled(loaded, monkeypatch):
    monkeypatch.setattr(calibration, "stock_text", lambda: None)
    monkeypatch.setattr(calibration, "WINDOW", 16)
    said = []
    data = planning.load_calibration(loaded[0], loaded[1], None, said.append)
    assert data.tokens.shape == (calibration.COUNT, 8)
    assert len(said) == 1
    assert "--optiq-calibration" in said[0]
    again = planning.load_calibration(loaded[0], loaded[1], None, said.append)
    assert data.digest == again.digest
