"""Requests to a live server, by http.client and by bare sockets."""

import http.client
import json
import socket
import urllib.parse
from email.message import Message
from typing import Any

COMPLETIONS = "/v1/chat/completions"


def chat(**fields: Any) -> dict[str, Any]:
    """The body of a short chat completion."""
    return {"messages": [{"role": "user", "content": "1, 2,"}], "max_tokens": 4, **fields}


def request(
    server, method: str, path: str, body: Any = None, headers=None, timeout: float = 60
) -> tuple[int, Message, Any]:
    """Status, headers and body of one request; a JSON body is parsed."""
    where = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=timeout)
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} if content is not None else {}
    try:
        connection.request(method, path, content, {**sent, **(headers or {})})
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    parsed = json.loads(text) if text.startswith((b"{", b"[")) else text
    return answer.status, answer.headers, parsed


def post(server, path: str, body: Any, headers=None) -> tuple[int, Any]:
    """Status and body of a request that posts JSON."""
    status, _, answer = request(server, "POST", path, body, headers)
    return status, answer


def get(server, path: str, headers=None) -> tuple[int, Any]:
    """Status and body of a request that gets something."""
    status, _, answer = request(server, "GET", path, None, headers)
    return status, answer


def wire(server, timeout: float = 30) -> socket.socket:
    """A bare connection to a server."""
    where = urllib.parse.urlsplit(server.url)
    return socket.create_connection((where.hostname or "", where.port or 0), timeout=timeout)


def received(connection: socket.socket) -> bytes:
    """What a server sends until it closes."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)
