import json
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@given(st.lists(st.tuples(keys, st.floats(allow_nan=False)), max_size=8))
def test_whatever_json_can_hold_is_a_key(measured):
    name = uuid4()
    Journal({"model": str(name)}).add_all(measured)
    again = Journal({"model": str(name)})
    expected = {json.dumps(key, sort_keys=True): value for key, value in measured}
    assert {json.dumps(key, sort_keys=True): again.get(key) for key, _ in measured} == expected
    assert len(again) == len(expected)


@pytest.mark.parametrize("line", ["[]", "3", '{"key": "a"}', '{"key": "a", "value": "b"}', "{"])
def test_a_line_that_is_no_measurement_is_left_out(line):
    journal = Journal({"model": "a"})
    journal.add("x", 1.0)
    assert journal.path is not None
    with journal.path.open("a") as stream:
        stream.write(f"\n{line}")
    assert len(Journal({"model": "a"})) == 1


def test_without_a_name_nothing_is_written(tmp_path):
    journal = Journal(None)
    journal.add("x", 1.0)
    assert journal.get("x") == 1.0
    assert journal.path is None
    assert list(tmp_path.iterdir()) == []
