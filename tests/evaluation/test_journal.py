"""Finished items on disk, damaged and not."""

import numpy as np
import pytest

from mlx_optiq_ext.evaluation.journal import Journal


def test_items_and_arrays_come_back():
    journal = Journal.open({"task": "a"})
    journal.put_item("1", {"answer": "x"})
    journal.put_arrays("w", loss=np.arange(3.0))
    again = Journal.open({"task": "a"})
    assert again.items() == {"1": {"answer": "x"}}
    found = again.arrays("w")
    assert found is not None
    assert found["loss"].tolist() == [0, 1, 2]
    again.drop_arrays("w")
    assert again.arrays("w") is None


@pytest.mark.parametrize("damage", [b"", b"PK", b"\x93NUMPY", None])
def test_damaged_arrays_are_left_out_and_said(damage, capsys):
    journal = Journal.open({"task": repr(damage)})
    journal.put_arrays("w", loss=np.arange(300.0))
    path = journal.folder / "w.npz"
    stored = path.read_bytes()
    middle = len(stored) // 2
    path.write_bytes(stored[:middle] + b"!!!" + stored[middle + 3 :] if damage is None else damage)
    assert journal.arrays("w") is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(path) in said


def test_a_changed_item_is_left_out_and_said(capsys):
    journal = Journal.open({"task": "b"})
    journal.put_item("1", "no")
    journal.put_item("2", "no")
    path = journal.folder / "items.jsonl"
    path.write_text(path.read_text().replace("no", "yes", 1))
    assert journal.items() == {"2": "no"}
    assert "1 line of" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_keeps_arrays_for_this_run(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_OPTIQ_EXT_CACHE", str(tmp_path / "file"))
    journal = Journal.open({"task": "c"})
    journal.put_arrays("w", loss=np.arange(3.0))
    journal.put_item("1", "x")
    assert journal.arrays("w") is not None
    journal.drop_arrays("w")
    assert journal.arrays("w") is None
    assert capsys.readouterr().err.count("\n") == 1
