"""What a server says at its start, and of who changed it."""

import json
import socket
import struct
import time

import pytest
from live_server import serve

from mlx_optiq_ext.kv import parse_spec
from mlx_optiq_ext.serving import Guard, Keys, Limits, described, record

from .raw import get, post, wire

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def records(log) -> list[dict]:
    lines = log.read_text().splitlines()
    return [json.loads(line.partition("audit: ")[2]) for line in lines if "audit: " in line]


def change(server, path, headers, **body) -> int:
    """Status of a request to change a server, once its log has one line more."""
    before, end = len(records(server.log)), time.monotonic() + 30
    status = post(server, path, body, headers)[0]
    while len(records(server.log)) == before and time.monotonic() < end:
        time.sleep(0.05)
    return status


def test_each_change_is_said_with_who_and_what_and_how_it_ended(tiny, folder, tmp_path):
    words = ("--optiq-allow-adapter-updates", "--optiq-adapter-dir", folder)
    keys = ("--optiq-api-key", "first-secret", "--optiq-api-key", "second-secret")
    with serve(tmp_path / "log", "--model", tiny, *words, *keys) as server:
        second = {"Authorization": "Bearer second-secret"}
        forged = "x\r\nINFO audit: {}\x7f\x1b[2J"
        third = {"Authorization": "Bearer third"}
        assert change(server, LOAD, second, lora_name="b", lora_path="b") == 200
        assert change(server, LOAD, second, lora_name="b", lora_path="a") == 409
        assert change(server, LOAD, second, lora_name=forged, lora_path=forged * 90) == 400
        assert change(server, UNLOAD, second, lora_name="b") == 200
        assert change(server, UNLOAD, third, lora_name="b") == 401
        assert get(server, "/health")[0] == 200
        found = records(server.log)
        text = server.log.read_text()
    assert [(each["action"], each["status"], each["code"]) for each in found] == [
        ("load", 200, None),
        ("load", 409, "adapter_conflict"),
        ("load", 400, "invalid_adapter"),
        ("unload", 200, None),
        ("unload", 401, "invalid_api_key"),
    ]
    assert [each["key"] for each in found] == [2, 2, 2, 2, None]
    assert {each["client"] for each in found} == {"127.0.0.1"}
    assert found[0]["adapter"] == found[3]["adapter"] == "b"
    assert len(found[0]["digest"]) == 16
    assert found[0]["digest"] == found[1]["digest"] == found[3]["digest"]
    assert found[2]["adapter"] == forged
    assert len(found[2]["path"]) < 200
    assert "secret" not in text
    assert "third" not in text
    assert "\x1b" not in text
    assert "\x7f" not in text
    assert "mlx_lm.server: adapters: none yet; at most all mounted, of rank 256 or less" in text
    assert f"mlx_lm.server: clients may load adapters from {folder}" in text
    assert "mlx_lm.server: keys: 2, asked for by all but /health" in text
    assert f"mlx_lm.server: listening at {server.url.removeprefix('http://')}" in text


@pytest.mark.parametrize("read", [True, False], ids=["whole", "cut"])
def test_a_change_is_said_whose_client_left(server, read):
    """With its outcome if it was done, with none if the request never arrived."""
    before = len(records(server.log))
    content = json.dumps({"lora_name": "a", "lora_path": "a", "load_inplace": True}).encode()
    head = f"POST {LOAD} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    length = f"Content-Length: {len(content)}\r\n\r\n"
    connection = wire(server)
    connection.sendall((head + length).encode() + (content if read else content[:-1]))
    # Closed with a reset, which an answer then meets.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    end = time.monotonic() + 30
    while len(records(server.log)) == before and time.monotonic() < end:
        time.sleep(0.05)
    (found,) = records(server.log)[before:]
    assert found["status"] == (200 if read else None)
    assert ("digest" in found) == read


def test_what_is_on_is_said_one_thing_a_line():
    guard = Guard("0.0.0.0", limits=Limits(3, 1 << 20, 1.5))
    assert list(described(guard, 80)) == [
        "listening at 0.0.0.0:80",
        "limits: 3 connections, 1,048,576 bytes a request, 1.5 s for a client",
    ]
    keyed = Guard(keys=Keys.read(["one", "two", "one"]))
    lines = list(described(keyed, 80, metrics=True))
    assert lines[1] == "keys: 2, asked for by all but /health"
    assert lines[-1] == "metrics: /metrics"
    near = list(described(Guard(own_pages=True), 80))
    assert near[-1].startswith("web pages: only those of this host may read")


def test_a_key_is_known_by_its_number():
    keys = Keys.read(["one", "two"])
    assert [keys.number(f"Bearer {key}") for key in ("one", "two", "three")] == [1, 2, None]
    assert keys.number(None) is None


def test_a_record_stays_on_its_line():
    line = record("load", adapter="a\nb\u2028\x7f\x9b", status=200, code=None)
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert json.loads(line.removeprefix("audit: "))["adapter"] == "a\nb\u2028\x7f\x9b"


@pytest.mark.parametrize(("spec", "bits"), [("4", 4.5), ("k8v4", 6.5), ("k8v4g32", 7.0)])
def test_bits_of_a_plan(spec, bits):
    plan = parse_spec(spec)
    assert plan is not None
    assert plan.bits_per_element == pytest.approx(bits)
