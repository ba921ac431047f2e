"""Requests that change the server: none that a web page can send, none from strangers."""

import json
from email.message import Message

import pytest

from mlx_optiq_ext.serving import Guard, Keys, Refusal, warning

from .conftest import ORIGINS
from .raw import COMPLETIONS, chat, get, post, received, request, wire

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
B = {"lora_name": "b", "lora_path": "b"}


def test_a_client_on_this_host_loads_and_unloads(server):
    assert post(server, LOAD, B) == (200, {"id": "b", "object": "model", "root": "b"})
    assert [each["id"] for each in get(server, "/v1/models")[1]["data"]] == ["tiny-qwen3", "a", "b"]
    headers = {"Origin": "https://good.example"} if ORIGINS else {}
    assert post(server, UNLOAD, {"lora_name": "b"}, headers)[0] == 200


def test_a_name_may_have_a_plus(server):
    assert post(server, LOAD, {"lora_name": "a+b", "lora_path": "b"})[0] == 200
    found = [
        post(server, COMPLETIONS, chat(model=model))[1].get("model") for model in ("a+b", "b+a")
    ]
    assert post(server, UNLOAD, {"lora_name": "a+b"})[0] == 200
    # Nobody is called b: what answered was no sum.
    assert found == ["a+b", None]


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        ({"Origin": "https://evil.example"}, 403, "forbidden_origin"),
        ({"Origin": "null"}, 403, "forbidden_origin"),
        ({"Host": "evil.example"}, 403, "forbidden_host"),
        ({"Host": "evil.example:8080"}, 403, "forbidden_host"),
        ({"Host": "localhost.evil.example"}, 403, "forbidden_host"),
        ({"X-Forwarded-For": "203.0.113.7"}, 401, "invalid_api_key"),
    ],
)
@pytest.mark.parametrize("path", [LOAD, UNLOAD])
def test_a_request_that_a_page_could_send_changes_nothing(server, path, headers, status, code):
    before = get(server, "/v1/models")
    found, body = post(server, path, B, headers)
    assert (found, body["error"]["code"]) == (status, code)
    assert get(server, "/v1/models")[1]["data"] == before[1]["data"]


def test_a_request_without_content_type_or_host_changes_nothing(server):
    body = json.dumps(B).encode()
    for head in (b"Host: localhost\r\n", b"Content-Type: application/json\r\n"):
        with wire(server) as connection:
            head = b"POST /v1/load_lora_adapter HTTP/1.1\r\n" + head
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert received(connection).splitlines()[0].split()[1] in (b"415", b"403")


def test_every_origin_does_not_mean_every_change():
    guard = Guard(origins=("*",))
    headers = Message()
    headers["Content-Type"] = "application/json; charset=utf-8"
    headers["Host"] = "[::1]:8080"
    guard.check_change(headers, "::ffff:127.0.0.1")
    with pytest.raises(Refusal, match="another host"):
        guard.check_change(headers, "192.0.2.1")
    Guard(keys=Keys.read(["secret"])).check_change(headers, "192.0.2.1")
    headers["Origin"] = "https://any.example"
    with pytest.raises(Refusal, match="--allowed-origins"):
        guard.check_change(headers, "127.0.0.1")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8080", "[::1]", "192.0.2.1", "box:80"])
def test_a_server_knows_its_own_names(host):
    assert Guard(host="box").serves(host)
    assert not Guard(host="box").serves(f"{host.partition(':')[0].strip('[')}.evil.example")


@pytest.mark.parametrize(("host", "near"), [("127.0.0.2", 1), ("localhost", 1), ("0.0.0.0", 0)])
def test_who_listens_to_all_without_a_key_is_warned(host, near):
    assert (warning(Guard(host=host)) is None) == bool(near)
    assert warning(Guard(host=host, keys=Keys.read(["secret"]))) is None


def test_no_folder_is_told(server, folder, tiny):
    """In the list of models, and in errors about files."""
    loaded = [request(server, "GET", path)[2] for path in ("/v1/models", "/v1/models?limit=20")]
    names = [[each["id"] for each in answer["data"]] for answer in loaded]
    assert names[0] == names[1] != []
    damaged = post(server, LOAD, {"lora_name": "x", "lora_path": "damaged"})
    absent = post(server, LOAD, {"lora_name": "x", "lora_path": "absent"})
    bare = post(server, LOAD, {"lora_name": "x", "lora_path": "."})
    for status, body in (damaged, absent, bare):
        assert (status, body["error"]["param"]) == (400, "lora_path")
    for text in map(json.dumps, (loaded, damaged, absent, bare)):
        assert str(folder.parent) not in text
        assert str(tiny.parent) not in text
    assert "damaged" in damaged[1]["error"]["message"]


def test_an_error_names_the_field_that_is_wrong(server):
    def wrong(path, body):
        status, answer = post(server, path, body)
        return status, answer["error"]["param"]

    assert wrong(UNLOAD, {"lora_name": "nobody"}) == (404, "lora_name")
    assert wrong(UNLOAD, {}) == (400, "lora_name")
    assert wrong(LOAD, {"lora_name": "a", "lora_path": "b"}) == (409, "lora_name")
    assert wrong(LOAD, {"lora_name": "a b", "lora_path": "b"}) == (400, "lora_name")
    assert wrong(LOAD, {"lora_name": "c"}) == (400, "lora_path")
