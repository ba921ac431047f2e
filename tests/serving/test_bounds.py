"""What would keep all other requests waiting, or fetch something, is refused before it begins."""

import http.server
import threading
import time

import pytest

from mlx_optiq_ext.serving import Refusal, check_bounds, read_object

from .raw import COMPLETIONS, chat, post

#: A template of this many turns takes minutes.
LOOP = "{% for i in range(99999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}x"


def image(url: str, **part) -> dict:
    content = [{"type": "image_url", "image_url": {"url": url}, **part}]
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.newest
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template_kwargs": {"chat_template": LOOP}}, "chat_template_kwargs"),
        (
            {"chat_template_kwargs": {"padding": "max_length", "max_length": 10**8}},
            "chat_template_kwargs",
        ),
        ({"chat_template_kwargs": {"tokenizer_kwargs": {}}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": ["a"]}, "chat_template_kwargs"),
        ({"stop": [f"word {number}" for number in range(10_000)]}, "stop"),
        ({"stop": "ab" * 50_000}, "stop"),
        ({"num_draft_tokens": 10**6}, "num_draft_tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_takes_the_generation_thread_is_refused_at_once(server, fields, param):
    began = time.monotonic()
    status, body = post(server, COMPLETIONS, chat(**fields))
    assert (status, body["error"]["param"]) == (400, param)
    assert time.monotonic() - began < 2
    assert post(server, COMPLETIONS, chat())[0] == 200


@pytest.mark.newest
@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": None},
        {"stop": ["\n\n", "User:"]},
        {"stop": "x" * 4096},
        {"num_draft_tokens": 5},
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_clients_send_is_served(server, fields):
    assert post(server, COMPLETIONS, chat(**fields))[0] == 200


@pytest.mark.newest
def test_no_image_is_fetched(server):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        status, body = post(
            server, COMPLETIONS, image(f"http://127.0.0.1:{site.server_port}/inside")
        )
        site.shutdown()
    assert (status, body["error"]["param"], asked) == (400, "messages", [])


@pytest.mark.parametrize("url", ["http://x/a", "HTTPS://x/a", "file:///etc/passwd", "/etc/passwd"])
def test_images_are_data(url):
    check_bounds(image("data:image/png;base64,AAAA"))
    for body in (image(url), image("data:,", image=url), image("data:,", image_url=url)):
        with pytest.raises(Refusal, match="data: URLs"):
            check_bounds(body)


@pytest.mark.newest
@pytest.mark.parametrize("content", [[5], [None], ["text"], [[]]])
def test_content_of_other_parts_is_refused_in_openais_form(server, content):
    status, body = post(server, COMPLETIONS, {"messages": [{"role": "user", "content": content}]})
    assert (status, body["error"]["param"]) == (400, "messages")


def test_a_body_of_very_many_parts_is_not_parsed():
    assert read_object(b'{"x": [' + b"[]," * 1000 + b"1]}")["x"][-1] == 1
    with pytest.raises(Refusal, match="lists and objects"):
        read_object(b'{"x": [' + b"[]," * 1_000_000 + b"1]}")
