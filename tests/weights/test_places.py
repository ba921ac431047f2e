"""Where a conversion reads and writes: what cannot work is said before anything is measured."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
from toy_fixtures import PLAIN

from mlx_optiq_ext import files
from mlx_optiq_ext.errors import InputError, OptiqError
from mlx_optiq_ext.files import staging
from mlx_optiq_ext.model import loading, source

BUDGET = (*PLAIN, "--optiq-budget", "3.5")


@pytest.fixture
def refused(command, toy, text, tmp_path):
    """Converts and returns the one line that refuses it."""

    def refused(source=toy, out=tmp_path / "out", *more) -> str:
        words = ("--hf-path", source, "--mlx-path", out, "--optiq-calibration", text, *BUDGET)
        done = command("convert", *words, *more)
        assert done.status == 2
        assert "Measuring" not in done.out + done.err
        return done.err.strip().splitlines()[-1]

    return refused


@pytest.mark.parametrize("name", ["mymodel", "someone/mymodel", "./mymodel", "a b", "x" * 300])
def test_a_source_that_is_not_there(refused, name):
    said = refused(name)
    assert "mlx_lm.convert: error: " in said
    assert "folder" in said or "cannot be read" in said


def test_a_source_that_is_no_model(refused, toy, tmp_path):
    assert "is not a folder" in refused(toy / "config.json")
    shutil.copytree(toy, tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    assert "has no model*.safetensors" in refused(tmp_path / "half")
    (tmp_path / "half" / "config.json").unlink()
    assert "has no config.json" in refused(tmp_path / "half")


def test_a_missing_source_of_other_commands(command, toy, text, tmp_path):
    done = command("generate", "--model", "someone/mymodel", "--optiq-kv", "4", "--prompt", "a")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "nor could it be read from the Hub" in done.err
    done = command("generate", "--model", tmp_path, "--optiq-kv", "4", "--prompt", "a")
    assert done.status == 2
    assert "has no config.json" in done.err
    adapters = ("--adapter-path", tmp_path / "nowhere")
    done = command("generate", "--model", toy, "--optiq-kv", "4", "--prompt", "a", *adapters)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "nowhere: no such folder" in done.err


def test_an_output_that_is_taken(refused, toy, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    assert "is a symbolic link to nothing" in refused(toy, tmp_path / "link")
    assert "exists already" in refused(toy, tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot write beside" in refused(toy, tmp_path / "file" / "out")


def test_a_disk_without_room(refused, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert "0.00 GB free" in refused()


@pytest.mark.parametrize("alive", [True, False])
def test_a_folder_of_another_process(tmp_path, alive):
    """That of a dead one is removed, that of a living one is respected."""
    target = tmp_path / "out"
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom mlx_optiq_ext import files\n"
        "with files.staged(Path(sys.argv[1])) as folder:\n"
        "    folder.mkdir()\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, target], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    if not alive:
        process.kill()
        process.wait()
    (left,) = tmp_path.iterdir()
    try:
        if alive:
            number = rf"another process \(process {process.pid}\)"
            with pytest.raises(InputError, match=number), files.staged(target):
                pass
            assert list(tmp_path.iterdir()) == [left]
        else:
            with files.staged(target) as folder:
                assert not left.exists()
                folder.mkdir()
            assert list(tmp_path.iterdir()) == [target]
    finally:
        process.kill()
        process.wait()


def test_what_only_looks_like_a_folder_of_ours_stays(tmp_path):
    others = [tmp_path / ".out.abcdefgh", tmp_path / ".out.bak.abcdefgh", tmp_path / ".out.a"]
    for folder in others:
        folder.mkdir()
        (folder / "notes").write_text("mine")
    (others[1] / staging.OWNER).write_text("1")
    with files.staged(tmp_path / "out") as folder:
        folder.mkdir()
    assert all((folder / "notes").exists() for folder in others)


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "out"

    def late():
        with files.staged(target) as folder:
            folder.mkdir()
            target.mkdir()
            (target / "mine").write_text("x")

    with pytest.raises(OptiqError, match="appeared while it was being made"):
        late()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_model_that_changes_while_it_is_converted_is_refused(
    command, toy, text, tmp_path, monkeypatch
):
    model = shutil.copytree(toy, tmp_path / "model")
    from mlx_optiq_ext.weights import plan

    save = plan.Plan.save

    def changed(self, *args, **kwargs):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
        save(self, *args, **kwargs)

    monkeypatch.setattr(plan.Plan, "save", changed)
    words = ("--hf-path", model, "--mlx-path", tmp_path / "out", "--optiq-calibration", text)
    done = command("convert", *words, *BUDGET)
    assert done.status == 2
    assert "changed while they were converted" in done.err
    assert not (tmp_path / "out").exists()


def test_a_model_that_was_only_touched_is_the_same(toy, tmp_path):
    model = shutil.copytree(toy, tmp_path / "model")
    before = source.SourceFiles.of(str(model))
    before = source.SourceFiles(str(model), None, before.states, loading.model_digest(model))
    os.utime(model / "config.json")
    before.check()
    (model / "model-2.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="changed while they were converted"):
        before.check()
