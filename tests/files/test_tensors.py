"""Headers of safetensors files that lie about the file are refused before a tensor is read."""

import json
import time

import mlx.core as mx
import pytest

from mlx_optiq_ext import files
from mlx_optiq_ext.errors import InputError


def write(path, header, data=b""):
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(body).to_bytes(8, "little") + body + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_what_mlx_writes_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {
        "a": mx.zeros((2, 3), mx.bfloat16),
        "b": mx.zeros((0, 4)),
        "c": mx.array(1, mx.uint8),
        "d": mx.zeros((3,), mx.complex64),
        "e": mx.zeros((3,), mx.bool_),
    }
    mx.save_safetensors(str(path), arrays, {"format": "pt"})
    header = files.read_header(path)
    assert {name: t.shape for name, t in header.tensors.items()} == {
        name: array.shape for name, array in arrays.items()
    }
    assert {name: t.nbytes for name, t in header.tensors.items()} == {
        name: array.nbytes for name, array in arrays.items()
    }
    assert header.metadata["format"] == "pt"


def test_every_model_of_the_tests_is_read(tiny):
    found = [files.read_header(path) for path in tiny.parent.rglob("*.safetensors")]
    assert found
    assert all(header.tensors for header in found)


EIGHT = bytes(8)
FALSE = {
    "unknown dtype": ({"a": entry(dtype="F31")}, EIGHT, "dtype is 'F31'"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT, "has no dtype"),
    "dtype of another type": ({"a": entry(dtype=["F32"])}, EIGHT, "dtype is"),
    "negative side": ({"a": entry(shape=[-2])}, EIGHT, "shape is .* whole numbers"),
    "huge side": ({"a": entry(shape=[1 << 60])}, EIGHT, "shape is"),
    "huge product": ({"a": entry(shape=[1 << 40] * 16)}, EIGHT, "has 8 bytes"),
    "float side": ({"a": entry(shape=[2.0])}, EIGHT, "shape is"),
    "true for a side": ({"a": entry(shape=[True])}, EIGHT, "shape is"),
    "string for a shape": ({"a": entry(shape="2")}, EIGHT, "shape is '2'"),
    "many sides": ({"a": entry(shape=[1] * 99 + [2])}, EIGHT, "at most 16 dimensions"),
    "one offset": ({"a": entry(offsets=[8])}, EIGHT, "data_offsets is"),
    "backwards": ({"a": entry(offsets=[8, 0])}, EIGHT, "data_offsets is"),
    "negative offset": ({"a": entry(offsets=[-8, 0])}, EIGHT, "data_offsets is"),
    "other size": ({"a": entry(shape=[3])}, EIGHT, r"has 8 bytes, which F32 of shape \[3\]"),
    "overlap": ({"a": entry(), "b": entry()}, EIGHT, "overlap or leave a hole"),
    "hole": ({"a": entry(offsets=[8, 16])}, bytes(16), "overlap or leave a hole"),
    "cut off": ({"a": entry()}, bytes(7), "holds 7 bytes of tensors where its header says 8"),
    "more": ({"a": entry()}, bytes(9), "holds 9 bytes"),
    "nothing said": ({}, EIGHT, "holds 8 bytes"),
    "list": ([1], b"", "give a JSON object"),
    "entry of another type": ({"a": 1}, b"", "give a JSON object"),
    "no name": ({"": entry()}, EIGHT, "is no name of a tensor"),
    "long name": ({"a" * 501: entry()}, EIGHT, "is no name of a tensor"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "no table of strings"),
    "metadata of another type": ({"__metadata__": "a"}, b"", "no table of strings"),
    "not JSON": (b"{}}", b"", "is not JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "is not UTF-8"),
    "twice": (b'{"a": 1, "a": 1}', b"", "has 'a' twice"),
    "deep": (b"[" * 100_000, b"", "nested deeper"),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_header_that_does_not_fit_is_refused(tmp_path, name):
    header, data, reason = FALSE[name]
    with pytest.raises(InputError, match=reason) as raised:
        files.read_header(write(tmp_path / "a.safetensors", header, data))
    assert "a.safetensors" in str(raised.value)


@pytest.mark.parametrize("start", [b"", b"\5\0\0", bytes(8), b"\1" + bytes(7), b"\xff" * 8])
def test_a_false_length_is_refused_before_anything_is_read(tmp_path, start):
    path = tmp_path / "a.safetensors"
    path.write_bytes(start + b"{}")
    with pytest.raises(InputError, match="has no safetensors header"):
        files.read_header(path)


def test_a_header_of_a_whole_disk_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as stream:
        stream.write((1 << 36).to_bytes(8, "little") + b"{")
        stream.truncate(1 << 37)  # sparse
    begin = time.process_time()
    with pytest.raises(InputError, match="one of 68,719,476,736 bytes"):
        files.read_header(path)
    assert time.process_time() - begin < 1


def test_the_largest_headers_take_seconds_at_most(tmp_path):
    tensors = {
        f"model.layers.{n}.mlp.experts.{n}.down_proj.weight": entry(offsets=[8 * n, 8 * n + 8])
        for n in range(50_000)
    }
    path = write(tmp_path / "a.safetensors", tensors, EIGHT * 50_000)
    begin = time.process_time()
    assert len(files.read_header(path).tensors) == 50_000
    assert time.process_time() - begin < 2
