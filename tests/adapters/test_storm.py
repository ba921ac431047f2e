"""A short storm of clients and administrators."""

import shutil

import pytest
from live_server import serve
from storm import DAMAGED, rage

from .conftest import NAMES


@pytest.mark.newest
def test_a_storm_brings_no_wrong_answer(exact, folder, tmp_path):
    root = tmp_path / "loadable"
    shutil.copytree(folder, root)
    (root / "broken").rename(root / DAMAGED)
    served = [f"--optiq-adapter={name}={root / name}" for name in NAMES]
    updates = ("--optiq-allow-adapter-updates", "--optiq-adapter-dir", root)
    limits = ("--optiq-max-adapters", 2, "--optiq-client-timeout", 2)
    with serve(tmp_path / "log", "--model", exact, *served, *updates, *limits) as server:
        report = rage(server.url, server.process.pid, NAMES, seconds=10, clients=8)
    assert report.wrong == []
    assert report.slowest < 60
    asked = [count for name, count in report.statuses.items() if name == "ask 200"]
    assert sum(asked) > 10
    assert report.statuses["load damaged 400"] > 0
