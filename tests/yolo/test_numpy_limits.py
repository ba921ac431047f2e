"""``.npz`` files that come to more than they look, or to something else."""

import io
import time
import zipfile

import mlx.core as mx
import numpy as np
import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.yolo.reading import checkpoint, numpy_file
from mlx_optiq_ext.yolo.reading.torch_objects import Damaged


def check(path) -> None:
    with path.open("rb") as stream:
        numpy_file.check(stream)


def array(values=(1.0, 2.0)) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array(values, np.float32))
    return stream.getvalue()


def written(path, data: bytes, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.npy", data)
    return path


def test_what_mlx_and_numpy_write_is_whole(tmp_path):
    path = tmp_path / "a.npz"
    arrays = [mx.zeros((3,)), mx.array(1.0), mx.zeros((2, 2), mx.bfloat16)]
    mx.savez(str(path), **{f"a{n}": array for n, array in enumerate(arrays)})
    check(path)
    for save in (np.savez, np.savez_compressed):
        save(
            path,
            a=np.zeros((3, 2), np.float16),
            b=np.float64(2),
            c=np.ones(3, bool),
            d=np.zeros((0, 2)),
        )
        check(path)


CHANGES = {
    "more than it has": (b"(2,)", b"(9,)", "another size"),
    "less than it has": (b"(2,)", b"(1,)", "another size"),
    "a huge side": (b"(2,), }" + b" " * 9, b"(2000000000,), }", "another size"),
    "an object": (b"<f4", b"|O4", "no array"),
    "code": (b"False", b"f() #", "no array"),
    "another format": (b"NUMPY", b"DUMPY", "no array"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_header_that_does_not_fit_is_refused(tmp_path, name):
    before, after, reason = CHANGES[name]
    data = array()
    assert before in data
    with pytest.raises(Damaged, match=reason):
        check(written(tmp_path / "a.npz", data.replace(before, after, 1)))


def test_a_bomb_is_refused_before_it_is_inflated(tmp_path):
    path = written(tmp_path / "a.npz", bytes(200 << 20), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    begin = time.process_time()
    with pytest.raises(InputError, match="come to far more than the file"):
        checkpoint.read(path)
    assert time.process_time() - begin < 1


def test_an_entry_larger_than_its_directory_says_is_refused(tmp_path):
    path = written(tmp_path / "a.npz", array(np.zeros(100_000)), zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\1\2")
    content[at + 24 : at + 28] = (1000).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(Damaged, match="does not match its checksum"):
        check(path)
