"""The folder: what is damaged or foreign is never used, and what is old makes room."""

import stat
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_optiq_ext import prompts
from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.prompts import tails
from mlx_optiq_ext.prompts.block_file import Piece, write
from mlx_optiq_ext.prompts.writer import Writer

ARRAYS = {
    "0.0.keys": ("bfloat16", np.arange(64, dtype=np.uint16).reshape(1, 2, 4, 8)),
    "0.0.values": ("uint32", np.arange(24, dtype=np.uint32).reshape(1, 2, 4, 3)),
    "0.1.keys": ("float32", np.zeros((1, 2, 4, 0), np.float32)),
}


def piece(key="a" * 40):
    return Piece(key, ARRAYS, {"tokens": 4, "0.layer": {"dims": [8, 8], "dtype": "bfloat16"}})


@pytest.fixture
def store(tmp_path):
    return prompts.BlockStore.open(tmp_path / "prompts", 10**6)


def test_a_block_comes_back(store):
    store.write("space", piece())
    found = store.block("space", piece().key)
    assert found is not None
    assert found.notes == piece().notes
    for name, (dtype, array) in ARRAYS.items():
        assert found.arrays[name][0] == dtype
        assert np.array_equal(found.arrays[name][1], array)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    for path in store.folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) in (0o700, 0o600)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A store, and the bytes of a block and of an end that a block holds."""
    folder = tmp_path_factory.mktemp("store")
    contents = []
    for each in (piece(), tails.reference(piece().key, 3, (0, "b" * 40))):
        write(folder / "whole", each)
        contents.append((folder / "whole").read_bytes())
    return prompts.BlockStore.open(folder, 10**6), contents


# 2,000 of them with --hypothesis-profile thorough.
@settings(max_examples=2 * settings().max_examples, deadline=None)
@given(data=st.data())
def test_no_mutated_block_is_used(written, data):
    store, contents = written
    content = data.draw(st.sampled_from(contents))
    place = data.draw(st.integers(0, len(content) - 1))
    damaged = data.draw(
        st.sampled_from(
            [
                content[:place],
                content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :],
                content[:place] + content[place + 1 :],
                content[:place] + b"\0" + content[place:],
                content + content[place:],
            ]
        )
    )
    path = store.folder / "space" / f"{piece().key}.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(damaged)
    assert store.block("space", piece().key) is None
    assert not path.exists()


def test_a_block_under_another_name_is_foreign(store, capsys):
    store.write("space", piece())
    own = store.folder / "space" / f"{piece().key}.safetensors"
    own.rename(own.with_name(f"{'b' * 40}.safetensors"))
    assert store.block("space", "b" * 40) is None
    assert capsys.readouterr().err.count("\n") == 1


def test_what_was_used_least_recently_makes_room(tmp_path):
    size = write(tmp_path / "one", piece())
    store = prompts.BlockStore.open(tmp_path / "prompts", size * 10)
    keys = [f"{number:040d}" for number in range(30)]
    for key in keys:
        store.write("space", piece(key))
        store.used("space", keys[:2])
        taken = sum(path.stat().st_size for path in store.folder.rglob("*.safetensors"))
        assert taken <= store.limit
    assert store.has("space", keys[0])
    assert store.has("space", keys[-1])
    assert not store.has("space", keys[5])


def test_a_disk_that_cannot_be_written_to_switches_writing_off(store, capsys):
    (store.folder / "space").write_text("in the way")
    store.write("space", piece())
    assert not store.writable
    store.write("other", piece())
    assert not store.has("other", piece().key)
    assert "prompts are no longer written" in capsys.readouterr().err


def test_the_writer_leaves_out_what_does_not_fit():
    writer, gate, done = Writer(piece().nbytes * 2), threading.Event(), []

    def wait(each):
        gate.wait(10)
        done.append(each.key)

    assert [writer.offer(piece(key), wait) for key in "abc"] == [True, True, False]
    assert writer.waits("a")
    gate.set()
    assert writer.flush()
    assert done == ["a", "b"]


def test_a_folder_is_described_and_cleared(store):
    store.write("space", piece())
    store.write_snapshot("space", piece().key, 3, piece("c" * 40))
    first, second = prompts.summary(store.folder)
    assert "all verify" in first
    assert "1 blocks, 1 snapshots" in second
    path = next(store.folder.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    assert "1 damaged" in prompts.summary(store.folder)[0]
    prompts.clear(store.folder)
    assert not list(store.folder.iterdir())


def test_files_of_others_stay(tmp_path):
    folder = tmp_path / "models"
    others = [
        folder / "model.safetensors",
        folder / "space" / "notes.part",
        folder / "a" / "b" / "c",
    ]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1" * 4096)
    folder.chmod(0o750)
    store = prompts.BlockStore.open(folder, 600)
    for name in "abc":
        store.write("space", piece(name * 40))
    store.evict()
    assert len(list(folder.rglob("*" + 40 * "?" + ".safetensors"))) < 3
    prompts.clear(folder)
    assert all(path.stat().st_size == 4096 for path in others)
    assert sum(path.is_file() for path in folder.rglob("*")) == 3
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="name another folder"):
        prompts.BlockStore.open(tmp_path / "file", 10)
    with pytest.raises(InputError, match="1 byte or more"):
        prompts.BlockStore.open(tmp_path / "new", 0)
