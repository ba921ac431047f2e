"""An HTTP request that is answered with an error, in OpenAI's form."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any


@dataclass
class Refusal(Exception):
    """A request that is answered with an error.

    Attributes:
        status: The status code of HTTP.
        message: For the client.
        code: OpenAI's code.
        param: The field that is wrong, or None.
        headers: Further headers of the answer.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def answer(self) -> bytes:
        """The whole answer, for a connection that no handler serves."""
        content = json.dumps(self.body()).encode()
        head = {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            "Connection": "close",
            **self.headers,
        }
        lines = [f"HTTP/1.0 {self.status} {HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in head.items()]
        return "\r\n".join([*lines, "", ""]).encode() + content


def without_folders(message: str, *known: str | Path) -> str:
    """A message without the folders of absolute paths; the last part of each stays.

    Args:
        message: For a client.
        known: Folders that the message may name, which may have spaces in their names.
    """
    for folder in sorted(map(str, known), key=len, reverse=True):
        message = message.replace(folder, Path(folder).name)
    return re.sub(r"(?<![\w.~/-])/(?:[^/\s'\":]+/)*(?=[^/\s])", "", message)
