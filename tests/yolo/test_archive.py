import zipfile

import mlx.core as mx
import numpy as np
import pytest

from mlx_optiq_ext.yolo import archive


@pytest.fixture
def arrays():
    draw = np.random.default_rng(1)
    return {
        "codes": np.rint(draw.standard_normal((64, 3, 3, 64)) * 2).astype(np.int8),
        "wide": draw.integers(-3000, 3000, (8, 5)).astype(np.int16),
        "half": draw.standard_normal(7).astype(np.float16),
        "turned": np.asfortranarray(draw.standard_normal((3, 4)).astype(np.float32)),
        "scalar": np.float32(3),
        "zeros": np.zeros((64, 64), np.int8),
        "none": np.zeros((0, 3), np.float32),
    }


def test_numpy_zipfile_and_mlx_read_it_back(arrays, tmp_path):
    path = tmp_path / "a.npz"
    size = archive.write(path, arrays)
    assert size == path.stat().st_size
    with zipfile.ZipFile(path) as opened:
        assert opened.testzip() is None
    with np.load(path) as loaded:
        for name, array in arrays.items():
            assert loaded[name].dtype == array.dtype
            assert np.array_equal(loaded[name], array)
    found = mx.load(str(path))
    assert isinstance(found, dict)
    for name, array in arrays.items():
        assert np.array_equal(np.array(found[name]), array)


def test_sizes_are_known_before_writing(arrays, tmp_path):
    size = archive.write(tmp_path / "a.npz", arrays)
    assert size == archive.END_BYTES + sum(archive.entry_bytes(n, a) for n, a in arrays.items())


def test_equal_arrays_make_equal_files(arrays, tmp_path):
    archive.write(tmp_path / "a.npz", arrays)
    archive.write(tmp_path / "b.npz", arrays)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_codes_take_about_their_entropy(arrays):
    codes = arrays["codes"]
    shares = np.unique(codes, return_counts=True)[1] / codes.size
    entropy = -(shares * np.log2(shares)).sum() * codes.size / 8
    size = archive.entry_bytes("codes", codes)
    assert entropy < size < 1.03 * entropy + 400


def test_zeros_take_almost_nothing(arrays):
    assert archive.entry_bytes("zeros", arrays["zeros"]) < 250
