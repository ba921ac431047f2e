import mlx.core as mx

from mlx_optiq_ext.model.replay import record
from mlx_optiq_ext.model.spill import Spill, Spilled, SpilledRecording

TOKENS = mx.array([[5, 9, 200, 31, 7, 44, 81, 3], [8, 8, 100, 2, 64, 12, 900, 77]])


def test_what_is_spilled_comes_back_in_new_arrays(tmp_path):
    spill = Spill(tmp_path)
    groups = Spilled(spill)
    groups.add({"a": {"x": mx.ones(3), "y": mx.array([True, False])}, "a b": {"x": mx.zeros(2)}})
    groups.add({"c": {"x": mx.array(2.5, mx.bfloat16)}})
    assert list(groups) == ["a", "a b", "c"]
    assert set(groups["a"]) == {"x", "y"}
    assert groups["a"]["y"].tolist() == [True, False]
    assert groups["c"]["x"].dtype == mx.bfloat16
    assert {name: set(group) for name, group in groups.items()}["a b"] == {"x"}
    folder = next(tmp_path.iterdir())
    del spill, groups
    assert not folder.exists()


def test_a_recording_on_disk_keeps_a_handed_on_state_once(loaded, tmp_path):
    recording = record(loaded[0], TOKENS)[1]
    spill = Spill(tmp_path)
    kept = SpilledRecording(spill)
    for call in recording:
        kept.append(call)
    sizes = [path.stat().st_size for path in sorted(next(tmp_path.iterdir()).iterdir())]
    assert sizes[1] < 0.7 * sizes[0]
    assert [c.index for c in kept[1:]] == [1]
    assert mx.array_equal(kept[1].hidden, recording[0].hidden_out)
