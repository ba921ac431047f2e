"""Requests to a live server with adapters: by the OpenAI client, and raw."""

import http.client
import json
import urllib.parse
from typing import Any

from .conftest import QUESTIONS

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def ask(server, adapter, question=QUESTIONS[0], **options):
    """A greedy answer, by whatever ``options`` select; ``adapter`` is the model."""
    done = server.client().chat.completions.create(
        model=adapter or "default_model",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=24,
        **options,
    )
    return done.choices[0].message.content or ""


def post(server, path, body) -> tuple[int, Any]:
    """Status and answer of a raw request."""
    where = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    return answer.status, json.loads(text) if text.startswith(b"{") else text


def chat(**fields):
    return {"messages": [{"role": "user", "content": QUESTIONS[0]}], "max_tokens": 24, **fields}
