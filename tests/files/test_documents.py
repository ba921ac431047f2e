"""Untrusted JSON: refused in one sentence, before it costs memory or time."""

import json
import os
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_optiq_ext import files
from mlx_optiq_ext.errors import InputError

MODEL_CONFIG = files.MODEL_CONFIG

REFUSED = {
    "cut off": ('{"a": [1', "is not JSON"),
    "two documents": ("{} {}", "is not JSON"),
    "a comment": ("{} // no", "is not JSON"),
    "a key twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "has 'c' twice"),
    "a key twice by escape": ('{"a": 1, "\\u0061": 2}', "has 'a' twice"),
    "NaN": ('{"a": NaN}', "holds NaN"),
    "Infinity": ("[Infinity]", "holds Infinity"),
    "minus Infinity": ("[-Infinity]", "holds -Infinity"),
    "a number too large": ("[1e999]", "1e999, which is infinite"),
    "a huge integer": ("[" + "9" * 5000 + "]", "integer of 5000 digits"),
    "a long number": ("[0." + "1" * 5000 + "]", "number of 5002 characters"),
    "half a surrogate pair": (r'["\ud800"]', "half a surrogate pair"),
    "deep lists": ("[" * 200_000 + "]" * 200_000, "deeper than 100"),
    "deep objects": ('{"a":' * 100_000, "deeper than 100"),
    "deep behind a string": ('["\\\\", "\\"", ' + "[" * 1000, "deeper than 100"),
    "many lists": ("[" + "[]," * 2_000_000 + "1]", "more values than fit in 128 MB"),
    "many keys": ("[" + '{"":0},' * 1_000_000 + "1]", "more values than fit in 128 MB"),
    "many numbers": ("[" + "0," * 4_000_000 + "1]", "more values than fit in 128 MB"),
    "too long": ('"' + "a" * (17 << 20) + '"', "longer than 16 MB"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_at_once_and_named(name):
    text, reason = REFUSED[name]
    begin = time.process_time()
    with pytest.raises(InputError, match=f"^a file .*{reason}") as raised:
        files.parse_json(text, "a file")
    assert time.process_time() - begin < 2
    assert len(str(raised.value)) < 300


def test_what_real_files_hold_is_read():
    numbers = '"model_max_length": 1000000000000000019884624838656, "b": [-1.5e-7]'
    text = rf'{{{numbers}, "a": "\ud83d\ude00 [[{{\\\""}}'
    assert files.parse_json(text, "a file") == json.loads(text)
    assert files.parse_json(b"[1]", "a file") == [1]
    limit = files.parse_json('{"time_step_limit": [0.0, Infinity]}', "a file", MODEL_CONFIG)
    assert limit["time_step_limit"][1] == float("inf")
    with pytest.raises(InputError, match="NaN"):
        files.parse_json("[NaN]", "a file", MODEL_CONFIG)


documents = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=20,
)


@given(documents, st.booleans())
def test_every_document_within_the_limits_reads_as_json_reads_it(document, ascii_only):
    try:
        text = json.dumps(document, ensure_ascii=ascii_only)
        text.encode()
    except UnicodeEncodeError:
        return
    assert files.parse_json(text, "a file") == document


@given(st.integers(0, 12), st.text(alphabet='"\\[]{},a', max_size=12))
def test_depth_is_counted_outside_of_strings_only(depth, string):
    text = "[" * depth + json.dumps(string) + "]" * depth
    limits = files.Limits(depth=6)
    if depth <= 6:
        files.parse_json(text, "a file", limits)
    else:
        with pytest.raises(InputError, match="deeper than 6"):
            files.parse_json(text, "a file", limits)


def test_depth_carries_over_from_block_to_block(monkeypatch):
    text = "[" * 60 + '"' + "]" * (3 << 20) + '",' + "[" * 60
    with pytest.raises(InputError, match="deeper than 100"):
        files.parse_json(text, "a file")


def test_only_regular_files_are_read(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("{}")
    link, dangling = tmp_path / "link", tmp_path / "dangling"
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "absent")
    assert files.read_json(link) == {}
    pipe, loop = tmp_path / "pipe", tmp_path / "loop"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path, reason in {
            pipe: "pipe, socket or device",
            tmp_path / "socket": "pipe, socket or device",
            tmp_path.joinpath("/dev/zero"): "pipe, socket or device",
            tmp_path: "it is a folder",
            dangling: "No such file",
            loop: "symbolic links",
            tmp_path / "a\0b": "null byte",
            tmp_path / ("a" * 300): "name too long",
        }.items():
            with pytest.raises(InputError, match=f"(?i)^cannot read .*{reason}"):
                files.read_json(path)


def test_a_file_beyond_its_limit_or_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b" " * 2000)
    with pytest.raises(InputError, match="is larger than 0 MB"):
        files.read_bytes(path, 1999)
    assert len(files.read_bytes(path, 2000)) == 2000
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # a sparse file takes no disk, but all of the memory
    with pytest.raises(InputError, match="is larger than 16 MB"):
        files.read_json(path)
    path.write_bytes('{"a": "ä"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"is not UTF-8 \(byte 7\)"):
        files.read_json(path)


def test_lines_end_at_line_breaks_only(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x\u2028y"}\r\n\n{"b": 1}\n', newline="")
    found = [(number, json.loads(line)) for number, line in files.read_lines(path)]
    assert found == [(1, {"a": "x\u2028y"}), (3, {"b": 1})]
