"""Nothing half-written stays, whichever line an interruption comes behind."""

import sys
from itertools import count

import pytest

from mlx_optiq_ext import files


def interrupted(action, line: int) -> bool:
    """Run an action with KeyboardInterrupt at its n-th line; whether it had that many."""
    seen = count(1)

    def trace(frame, event, argument):
        if event == "line" and next(seen) == line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
        return False
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)


@pytest.mark.newest
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_interruption_at_any_line_leaves_all_or_nothing(tmp_path, kind):
    target = tmp_path / "written.json"

    def write():
        if kind == "file":
            files.write_text(target, "{}")
            return
        with files.staged(target) as folder:
            folder.mkdir()
            (folder / "inside").write_text("{}")

    for line in count(1):
        hit = interrupted(write, line)
        files.discard_unfinished()
        left = [path for path in tmp_path.iterdir() if path != target]
        assert left == [], line
        if target.is_dir():
            assert (target / "inside").read_text() == "{}"
            (target / "inside").unlink()
            target.rmdir()
        elif target.exists():
            assert target.read_text() == "{}"
            target.unlink()
        if not hit:
            break
    assert line > 20
