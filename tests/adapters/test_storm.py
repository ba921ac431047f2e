"""A short storm of clients and administrators."""

import shutil
import sys

import pytest
from live_server import serve
from storm import DAMAGED, rage, resources

from .asking import LOAD, UNLOAD, post
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


@pytest.mark.newest
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loads_leave_no_threads_behind(server):
    """MLX keeps a thread for every thread that has ever computed."""

    def load(count):
        for _ in range(count):
            assert post(server, LOAD, {"lora_name": "again", "lora_path": "33"})[0] == 200
            assert post(server, LOAD, {"lora_name": "bad", "lora_path": "broken"})[0] == 400
            assert post(server, UNLOAD, {"lora_name": "again"})[0] == 200

    load(2)
    before = resources(server.process.pid)[1]
    load(10)
    assert resources(server.process.pid)[1] <= before + 3
