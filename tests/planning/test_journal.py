import json
import math
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_optiq_ext import files
from mlx_optiq_ext.planning.journal import Journal

keys: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


def test_a_cut_off_line_is_measured_again():
    journal = Journal({"model": "a"})
    journal.add(["x", 3], 0.5)
    journal.add(["y", 3], 0.25)
    assert journal.path is not None
    journal.path.write_text(journal.path.read_text()[:-9])
    again = Journal({"model": "a"})
    assert again.get(["x", 3]) == 0.5
    assert again.get(["y", 3]) is None
    again.add(["y", 3], 0.125)
    assert Journal({"model": "a"}).get(["y", 3]) == 0.125
    assert len(Journal({"model": "b"})) == 0


@given(st.lists(st.tuples(keys, st.floats(min_value=0, allow_infinity=False)), max_size=8))
def test_whatever_json_can_hold_is_a_key(measured):
    name = uuid4()
    Journal({"model": str(name)}).add_all(measured)
    again = Journal({"model": str(name)})
    expected = {json.dumps(key, sort_keys=True): value for key, value in measured}
    assert {json.dumps(key, sort_keys=True): again.get(key) for key, _ in measured} == expected
    assert len(again) == len(expected)


@pytest.mark.parametrize("line", ["[]", "3", '{"key": "a"}', '{"key": "x", "value": 2.0}', "{"])
def test_a_line_that_is_no_measurement_is_left_out_and_said(line, capsys):
    journal = Journal({"model": line})
    journal.add("x", 1.0)
    assert journal.path is not None
    with journal.path.open("a") as stream:
        stream.write(f"\n{line}")
    again = Journal({"model": line})
    assert (len(again), again.get("x")) == (1, 1.0)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"1 line of {journal.path}" in said
    assert "MLX_OPTIQ_EXT_CACHE" in said


@pytest.mark.parametrize("value", [-1e9, -1e-12, True, "0.5", None, [0.5]])
def test_only_finite_numbers_from_zero_on_are_believed(value, capsys):
    path = Journal({"value": repr(value)}).path
    assert path is not None
    files.append_records(path, [{"key": "x", "value": value}, {"key": "y", "value": 0}])
    again = Journal({"value": repr(value)})
    assert (again.get("x"), again.get("y")) == (None, 0.0)
    assert "1 line of" in capsys.readouterr().err


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_what_would_not_be_believed_is_not_written(value):
    journal = Journal({"model": "a"})
    journal.add("x", value)
    assert journal.path is not None
    assert not journal.path.exists()


def test_a_flipped_digit_is_noticed(capsys):
    journal = Journal({"model": "a"})
    journal.add("x", 0.5)
    assert journal.path is not None
    journal.path.write_text(journal.path.read_text().replace("0.5", "0.6"))
    assert Journal({"model": "a"}).get("x") is None
    assert "1 line of" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [10, 1000])
def test_a_file_larger_than_any_that_is_written_is_ignored(tmp_path, limit, capsys):
    path = tmp_path / "large.jsonl"
    files.append_records(path, [{"key": "x" * 100, "value": 1.0}], limit)
    assert len(list(files.read_records(path, limit))) == (limit == 1000)
    assert capsys.readouterr().err.count("\n") == (limit == 10)


def test_a_folder_that_cannot_be_written_to_keeps_nothing_and_says_so(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_OPTIQ_EXT_CACHE", str(tmp_path / "file"))
    journal = Journal({"model": "a"})
    journal.add("x", 1.0)
    journal.add("y", 2.0)
    assert journal.get("x") == 1.0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "not kept" in said
    assert "MLX_OPTIQ_EXT_CACHE" in said


def test_without_a_name_nothing_is_written(tmp_path):
    journal = Journal(None)
    journal.add("x", 1.0)
    assert journal.get("x") == 1.0
    assert journal.path is None
    assert list(tmp_path.iterdir()) == []
