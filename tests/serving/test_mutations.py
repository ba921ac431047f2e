"""Mutated requests over every endpoint: each gets a well-formed answer, and the server goes on."""

import json
import os
import random

import pytest

from .raw import COMPLETIONS, chat, get, post, received, wire

#: The full run has 5000.
NUMBER = int(os.environ.get("MLX_OPTIQ_MUTATIONS", "100"))

PATHS = (
    *("/v1/completions", COMPLETIONS, "/chat/completions", "/v1/models", "/v1/models/a"),
    *("/v1/models?limit=20", "/health", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    *("/", "//", "/../etc", "*", "/%00", "/v1/nothing", "/" + "x" * 3000),
)
VALUES = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**40, 0.5, 1e30, -1e30, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", "a", "\ud800", "\x00", "x" * 5000, "/etc/passwd", "a/b"),
    *([], [1], ["a"], [[]], [{}], {}, {"a": 1}, {"1": 1}, {"99999": 1}, {"include_usage": True}),
)
FIELDS = (
    *("model", "adapters", "draft_model", "messages", "prompt", "max_tokens", "temperature"),
    *("top_p", "top_k", "min_p", "repetition_penalty", "repetition_context_size", "stop", "seed"),
    *("presence_penalty", "frequency_penalty", "xtc_probability", "xtc_threshold", "logit_bias"),
    *("logprobs", "top_logprobs", "stream", "stream_options", "tools", "role_mapping"),
    *("chat_template_kwargs", "num_draft_tokens", "lora_name", "lora_path", "load_inplace"),
)


def body_of(draw: random.Random) -> bytes:
    good = {**chat(max_tokens=2), "prompt": "1, 2", "lora_name": "z", "lora_path": "damaged"}
    for _ in range(draw.randrange(3)):
        good[draw.choice(FIELDS)] = draw.choice(VALUES)
    if good.get("max_tokens") not in (2, None):
        good["max_tokens"] = draw.choice([2, "2", -1, None, 1.5, True])
    content = bytearray(json.dumps(good).encode())
    for _ in range(draw.choice([0, 0, 0, 0, 1, 4])):
        content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content[: draw.choice([len(content)] * 5 + [len(content) // 2])])


def request_of(draw: random.Random) -> bytes:
    body = body_of(draw)
    method = draw.choice(["POST"] * 24 + ["GET"] * 6 + ["PUT", "OPTIONS", "\x01", "get"])
    path, version = draw.choice([*PATHS, *PATHS[:3] * 4]), draw.choice(["1.1"] * 20 + ["9", "x"])
    lines = [f"{method} {path} HTTP/{version}"]
    headers = {
        "Host": draw.choice([*["localhost", "127.0.0.1:1"] * 9, "evil.example", "[::1", ""]),
        "Content-Type": draw.choice(["application/json", "application/json", "text/plain", ""]),
        "Content-Length": draw.choice([len(body)] * 40 + [0, -1, len(body) + 9, "x", 10**20]),
        "Origin": draw.choice([None, None, "null", "https://evil.example"]),
        "Authorization": draw.choice([None, "Bearer x", "\xff"]),
        "X-OptIQ-Adapter": draw.choice([None, None, None, "a", "b", "\xe9", "a, b"]),
        "Expect": draw.choice([None] * 9 + ["100-continue"]),
    }
    lines += [f"{name}: {value}" for name, value in headers.items() if value is not None]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def check(answer: bytes, sent: bytes) -> None:
    """Each answer is HTTP with JSON, a stream, or nothing but headers."""
    head, _, content = answer.partition(b"\r\n\r\n")
    while b" 100 " in head.splitlines()[0]:
        head, _, content = content.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/"):
        head, content = b"", answer  # HTTP/0.9 has no headers
    if b"text/event-stream" in head or not content:
        assert b" 204 " in head or b"event-stream" in head or sent.startswith(b"HEAD"), sent
        return
    json.loads(content)


@pytest.mark.newest
def test_mutated_requests_get_well_formed_answers(server):
    draw = random.Random(20)
    for number in range(NUMBER):
        sent = request_of(draw)
        with wire(server, timeout=60) as connection:
            try:
                connection.sendall(sent)
                answer = received(connection)
            except ConnectionError as error:
                raise AssertionError(f"request {number}: {error}: {sent[:300]}") from error
        assert answer, f"request {number}: {sent[:300]!r}"
        try:
            check(answer, sent)
        except (AssertionError, ValueError) as error:
            raise AssertionError(f"request {number}: {sent[:400]!r} {answer[:900]!r}") from error
    assert get(server, "/health") == (200, {"status": "ok"})
    assert post(server, COMPLETIONS, chat())[0] == 200
