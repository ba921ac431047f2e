"""Limits of time, size and number, on bare sockets; and clients that leave or never read."""

import contextlib
import signal
import socket
import struct
import time

import pytest
from live_server import serve

from mlx_optiq_ext.serving import Connection, gone

from .raw import COMPLETIONS, chat, get, post, received, request, wire

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
LONG = {"max_tokens": 1_000_000, "logit_bias": {"0": -100, "1": -100}}


def status(answer: bytes) -> bytes:
    return answer.split(b" ", 2)[1]


@pytest.mark.parametrize("size", [200_001, 10**12, 10**40])
def test_a_large_body_is_refused_before_it_is_read(server, size):
    with wire(server) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n{" % size)
        connection.shutdown(socket.SHUT_WR)
        answer = received(connection)
    assert status(answer) == b"413"
    assert b"larger than 200000 bytes" in answer


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"Content-Length: -1\r\n", b"400"),
        (b"Content-Length: +2\r\n", b"400"),
        (b"Content-Length: 2x\r\n", b"400"),
        (b"Content-Length: 2\r\nContent-Length: 2\r\n", b"400"),
        (b"Content-Length: 9\r\n", b"400"),
        (b"Transfer-Encoding: chunked\r\n", b"411"),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n", b"411"),
        (b"", b"411"),
    ],
)
def test_a_body_of_unclear_length_is_refused(server, head, expected):
    with wire(server) as connection:
        connection.sendall(HEAD + head + b"\r\n{}")
        connection.shutdown(socket.SHUT_WR)
        answer = received(connection)
    assert status(answer) == expected
    assert answer.endswith(b"}}")


@pytest.mark.parametrize("start", [b"", b"GET /hea", HEAD, HEAD + b"Content-Length: 9\r\n\r\n{"])
def test_a_request_that_does_not_arrive_ends(server, start):
    began = time.monotonic()
    with wire(server) as connection:
        connection.sendall(start)
        with contextlib.suppress(ConnectionError):
            answer = received(connection)
            assert answer == b"" or status(answer) == b"408"
    assert 1.5 < time.monotonic() - began < 6


def test_a_request_that_drips_ends_too(server):
    began = time.monotonic()
    with wire(server) as connection, contextlib.suppress(ConnectionError):
        for byte in HEAD * 3:
            connection.sendall(bytes([byte]))
            time.sleep(0.1)
            if gone(connection):
                break
    assert time.monotonic() - began < 6


def test_more_connections_than_the_limit_are_turned_away(tiny, tmp_path):
    limits = ("--optiq-max-connections", 3, "--optiq-client-timeout", 8)
    with serve(tmp_path / "log", "--model", tiny, *limits) as server:
        with contextlib.ExitStack() as held:
            for _ in range(3):
                held.enter_context(wire(server))
            # A connection counts once its thread runs, which a busy machine may put off.
            for _ in range(20):
                found, headers, body = request(server, "POST", COMPLETIONS, chat())
                if found == 503:
                    break
            assert (found, headers["Retry-After"]) == (503, "1")
            assert body["error"]["code"] == "server_busy"
        for _ in range(50):
            if post(server, COMPLETIONS, chat())[0] == 200:
                break
            time.sleep(0.1)
        assert post(server, COMPLETIONS, chat())[0] == 200


def test_many_connections_may_wait_for_a_busy_server(server):
    assert get(server, "/health")[0] == 200
    server.process.send_signal(signal.SIGSTOP)
    try:
        with contextlib.ExitStack() as held:
            waiting = [held.enter_context(wire(server, timeout=5)) for _ in range(40)]
            for connection in waiting:
                connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            server.process.send_signal(signal.SIGCONT)
            assert {status(received(connection)) for connection in waiting} == {b"200"}
    finally:
        server.process.send_signal(signal.SIGCONT)


def send(server, body) -> socket.socket:
    """A connection on which a completion was asked for, with a small buffer for its answer."""
    import json

    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    address = server.url.removeprefix("http://").split(":")
    connection.connect((address[0], int(address[1])))
    content = json.dumps(body).encode()
    head = HEAD + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
    connection.sendall(head + content)
    return connection


def unloaded(server, name: str, seconds: float) -> float:
    """Seconds until an adapter was unloaded."""
    began = time.monotonic()
    path = "/v1/unload_lora_adapter"
    assert request(server, "POST", path, {"lora_name": name}, timeout=seconds)[0] == 200
    return time.monotonic() - began


def load(server, name: str) -> None:
    body = {"lora_name": name, "lora_path": "b"}
    assert post(server, "/v1/load_lora_adapter", body)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_left_ends_its_row_and_frees_its_adapter(server, stream):
    name = f"left-{stream}"
    load(server, name)
    connection = send(server, chat(model=name, stream=stream, **LONG))
    time.sleep(0.7)
    connection.close()
    assert unloaded(server, name, 20) < 5
    assert post(server, COMPLETIONS, chat())[0] == 200


def test_clients_that_left_before_their_turn_hold_nothing(server):
    load(server, "queued")
    # A request with a seed is served alone.
    bodies = [chat(model="queued", stream=True, seed=seed, **LONG) for seed in range(4)]
    connections = [send(server, body) for body in bodies]
    time.sleep(0.5)
    for connection in connections:
        reset = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        connection.close()
    assert unloaded(server, "queued", 60) < 10


def test_a_client_that_never_reads_does_not_hold_its_adapter(server):
    load(server, "unread")
    with send(server, chat(model="unread", stream=True, **LONG)):
        time.sleep(0.7)
        # The buffers fill, and two seconds later the row ends.
        assert unloaded(server, "unread", 30) < 15


@pytest.mark.newest
def test_a_rows_adapter_is_free_before_its_client_has_read_the_answer(tiny, folder, tmp_path):
    updates = ("--optiq-allow-adapter-updates", "--optiq-adapter-dir", folder)
    with serve(tmp_path / "log", "--model", tiny, *updates) as server:
        name = "slow" * 30  # stands in every piece of the answer
        load(server, name)
        body = chat(model=name, stream=True, max_tokens=300, logit_bias={"0": -100, "1": -100})
        with send(server, body) as connection:
            # The connection waits for a minute until its client reads.
            assert unloaded(server, name, 40) < 20
            connection.setblocking(False)
            assert not gone(connection)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "someone/another-model"}, "model"),
        ({"model": "/etc"}, "model"),
        ({"model": "../tiny-qwen3"}, "model"),
        ({"adapters": "someone/an-adapter"}, "adapters"),
        ({"adapters": "/etc"}, "adapters"),
        ({"draft_model": "someone/another-model"}, "draft_model"),
        ({"draft_model": 1}, "draft_model"),
    ],
)
def test_a_request_names_only_what_is_served(server, keyed, fields, param):
    from .conftest import BEARER

    for asked, served in ((server, "tiny-qwen3, a"), (keyed, "tiny-qwen3")):
        found, body = post(asked, COMPLETIONS, chat(**fields), BEARER)
        assert (found, body["error"]["param"]) == (400 if param == "draft_model" else 404, param)
        if found == 404:
            assert f"(served: {served})" in body["error"]["message"]
            ids = [each["id"] for each in get(asked, "/v1/models", BEARER)[1]["data"]]
            assert ", ".join(ids) == served


def test_a_reader_gives_up_at_the_end_of_its_time():
    near, far = socket.socketpair()
    with near, far:
        connection = Connection(near, 0.3)
        reader = connection.makefile("rb")
        far.sendall(b"one\ntwo")
        assert reader.readline() == b"one\n"
        with pytest.raises(TimeoutError):
            reader.readline()
        with pytest.raises(TimeoutError):
            connection.sendall(bytes(1 << 24))
        assert connection.sent == 0
        connection.check()
        far.close()
        time.sleep(0.3)
        with pytest.raises(ConnectionAbortedError):
            connection.check()
