"""A live stock server with adapters, asked by the real OpenAI client."""

import contextlib
import json
import socket
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from live_server import serve

from .asking import ask, chat, post
from .conftest import QUESTIONS


def test_a_request_selects_by_model_body_field_or_header(server, plain, named):
    assert ask(server, "11") == "11"
    assert ask(server, "22") == "22"
    assert ask(server, None) == plain[QUESTIONS[0]]
    assert ask(server, None, extra_body={"adapters": "11"}) == "11"
    assert ask(server, None, extra_body={"adapters": str(named["22"])}) == "22"
    assert ask(server, None, extra_headers={"X-OptIQ-Adapter": "22"}) == "22"
    assert ask(server, "22", extra_headers={"X-OptIQ-Adapter": "22"}) == "22"


def test_two_adapters_in_one_request_are_refused(server):
    with pytest.raises(openai.BadRequestError, match="names two adapters"):
        ask(server, "11", extra_headers={"X-OptIQ-Adapter": "22"})
    with pytest.raises(openai.BadRequestError, match="names two adapters"):
        ask(server, "11", extra_body={"adapters": "22"})


@pytest.mark.parametrize("name", ["nobody", "../11", "11/", "x" * 10_000_000, "\x00", "é1"])
def test_an_unknown_model_is_not_found_and_never_the_base(server, name):
    with pytest.raises(openai.NotFoundError) as raised:
        ask(server, name)
    body = raised.value.body
    assert isinstance(body, dict)
    assert body["code"] == "model_not_found"
    assert body["param"] == "model"
    assert len(body["message"]) < 400
    assert ask(server, "11") == "11"


@pytest.mark.parametrize(
    "value", [b"\xff\xfe", b"1\t1", b"11, 22", b"%311", b"11\r\nX-OptIQ-Adapter: 22"]
)
def test_a_header_with_odd_bytes_is_not_found(server, value):
    body = json.dumps(chat()).encode()
    where = urllib.parse.urlsplit(server.url)
    with socket.create_connection((where.hostname or "", where.port or 0), timeout=30) as wire:
        wire.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-OptIQ-Adapter: "
            + value
            + b"\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
            + body
        )
        answer = b""
        while part := wire.recv(65536):
            answer += part
    assert b" 404 " in answer.splitlines()[0]
    assert b"model_not_found" in answer


def test_models_lists_the_base_and_its_adapters(server, exact, named):
    listed = server.client().models.list().data
    base, *adapters = [each.model_dump() for each in listed]
    assert base["id"] == exact.name
    assert {each["id"] for each in adapters} >= {"11", "22"}
    first = next(each for each in adapters if each["id"] == "11")
    assert first["root"] == named["11"].name
    assert first["parent"] == base["id"]


def test_sixteen_clients_get_what_each_would_get_alone(server, plain):
    who = [(None, "11", "22")[i % 3] for i in range(32)]
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(32)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda each: ask(server, *each), zip(who, questions, strict=True)))
    expected = [name or plain[q] for name, q in zip(who, questions, strict=True)]
    assert answers == expected


def test_streams_of_different_adapters_do_not_mix(server):
    def stream(name):
        chunks = server.client().chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": QUESTIONS[1]}],
            temperature=0,
            max_tokens=24,
            stream=True,
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(stream, ["11", "22"] * 4)) == ["11", "22"] * 4


def test_prompt_caches_of_adapters_are_apart(server, plain):
    for _ in range(2):  # the second time from the prompt cache
        assert ask(server, "11", QUESTIONS[2]) == "11"
        assert ask(server, "22", QUESTIONS[2]) == "22"
        assert ask(server, None, QUESTIONS[2]) == plain[QUESTIONS[2]]


def test_a_seed_is_served_alone_with_its_adapter(server):
    assert ask(server, "11", seed=3) == "11"


def test_text_completions_and_tools_take_an_adapter(server):
    client = server.client()
    done = client.completions.create(
        model="default_model",
        prompt="Say it.",
        max_tokens=4,
        temperature=0,
        extra_headers={"X-OptIQ-Adapter": "11"},
    )
    plain = client.completions.create(
        model="default_model", prompt="Say it.", max_tokens=4, temperature=0
    )
    assert done.choices[0].text != plain.choices[0].text
    function = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    assert ask(server, "22", tools=tools) == "22"


def test_a_full_queue_is_worked_off(server, plain):
    def asked(name):
        # mlx-lm's server turns connections away while too many wait to be accepted.
        with contextlib.suppress(openai.APIConnectionError):
            return ask(server, name)

    who = [(None, "11", "22")[i % 3] for i in range(96)]
    with ThreadPoolExecutor(96) as pool:
        answers = list(pool.map(asked, who))
    expected = [name or plain[QUESTIONS[0]] for name in who]
    served = [pair for pair in zip(answers, expected, strict=True) if pair[0] is not None]
    assert len(served) > 16
    assert all(found == wanted for found, wanted in served)
    assert ask(server, "11") == "11"


def test_a_draft_model_is_the_servers(server):
    status, body = post(server, "/v1/chat/completions", chat(draft_model="other"))
    assert (status, body["error"]["param"]) == (400, "draft_model")


def test_clients_that_leave_disturb_nobody(server, plain):
    def leave(name):
        stream = server.client().chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": QUESTIONS[3]}],
            max_tokens=400,
            logit_bias={"0": -100},
            stream=True,
        )
        next(iter(stream))
        stream.close()

    with ThreadPoolExecutor(12) as pool:
        leaving = [pool.submit(leave, name) for name in ("11", "22", "default_model") * 2]
        staying = [pool.submit(ask, server, name) for name in ("11", None, "22") * 2]
        for each in leaving:
            each.result()
        answers = [each.result() for each in staying]
    assert answers == ["11", plain[QUESTIONS[0]], "22"] * 2


def test_with_a_kv_plan_and_a_draft_model(exact, named, tmp_path):
    arguments = ("--model", exact, f"--optiq-adapter=11={named['11']}")
    with serve(tmp_path / "kv", *arguments, "--optiq-kv", "8") as server:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda name: ask(server, name), ["11", None] * 3))
        assert answers[::2] == ["11"] * 3
        assert len(set(answers)) == 2
    with serve(tmp_path / "draft", *arguments, "--draft-model", exact) as server:
        assert ask(server, "11") == "11"
        assert ask(server, None) != "11"
