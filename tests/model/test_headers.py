import json
import struct

import mlx.core as mx
import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.model.headers import Header, read_file


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros((2, 3)), "b": mx.zeros((4,), mx.float16)})
    return path


def test_headers_are_read_without_the_tensors(stored):
    assert read_file(stored) == {"a": Header("F32", (2, 3), 24), "b": Header("F16", (4,), 8)}


BODY = json.dumps({"a": {"dtype": "F32", "shape": [1]}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        struct.pack("<Q", 2**60),
        struct.pack("<Q", 4) + b"null",
        b"\x7fELF" * 9,
        struct.pack("<Q", len(BODY)) + BODY,
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.safetensors"):
        read_file(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="none"):
        read_file(tmp_path / "none.safetensors")
