"""The body of a request to complete a text."""

import json
from typing import Any

from .refusal import Refusal

#: Lists and objects of a request. Python takes a second for so many, in which nothing else runs.
CONTAINERS = 1_000_000


def read_object(content: bytes) -> dict[str, Any]:
    """The JSON object that a request carries.

    Raises:
        Refusal: 400, it is no JSON object, or one of very many parts.
    """
    # Brackets in texts count as well: a text of so many is rarer than an attack.
    if content.count(b"[") + content.count(b"{") > CONTAINERS:
        raise _refused(f"the request has more than {CONTAINERS:,} lists and objects")
    try:
        body = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise _refused("the request is not UTF-8") from error
    except RecursionError as error:
        raise _refused("the request is nested too deep") from error
    except ValueError as error:
        raise _refused(f"the request is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise _refused("the request is not a JSON object")
    return body


def check_text(path: str, body: dict[str, Any]) -> None:
    """Refuse a request that has no text to complete.

    Args:
        path: Where it was sent to: a chat has messages, anything else a prompt.
        body: Its body.

    Raises:
        Refusal: 400, which names the field.
    """
    if not path.endswith("/chat/completions"):
        if not isinstance(body.get("prompt"), str):
            raise _refused("prompt must be a text", "prompt")
        return
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _refused("messages must be a list of messages", "messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _refused(f"messages[{number}] must be an object with a role", "messages")


def _refused(message: str, param: str | None = None) -> Refusal:
    return Refusal(400, message, "invalid_request", param)
