import json

import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.planning.texts import read_texts


def test_all_json_lines_forms_are_read(tmp_path):
    path = tmp_path / "data.jsonl"
    records = [
        {"text": "plain"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"prompt": "a", "completion": "b"},
        {"question": "c", "answer": "d"},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    texts = read_texts(path)
    assert texts[0] == "plain"
    assert [len(t) for t in texts[1:]] == [1, 2, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\xff\xfe\x00bad", "cannot read"),
        ("a.jsonl", b'{"text": "ok"}\n{broken', "line 2 is not JSON"),
        ("a.jsonl", b'{"other": 1}', "line 1 has no text"),
        ("a.jsonl", b"[1, 2]", "line 1 has no text"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_texts(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot read the calibration file"):
        read_texts(tmp_path / "none.txt")
