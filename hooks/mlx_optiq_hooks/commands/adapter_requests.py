"""Which adapter a request means, and answers in OpenAI's form when it cannot be served."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_optiq_ext.errors import OptiqError

from .server import base_names

HEADER = "X-OptIQ-Adapter"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
#: Bytes of a request to load or unload an adapter.
LIMIT = 1 << 16


@dataclass
class Refusal(Exception):
    """A request that is answered with an error.

    Attributes:
        status: Of HTTP.
        message: For the client.
        code: OpenAI's code.
        param: The field that is wrong.
    """

    status: int
    message: str
    code: str
    param: str | None = None

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}


def refusal(error: OptiqError) -> Refusal:
    """The answer to an error of the catalogue."""
    from mlx_optiq_ext.adapters import catalogue

    if isinstance(error, catalogue.UnknownAdapterError):
        return Refusal(404, str(error), "model_not_found", "model")
    if isinstance(error, catalogue.AdapterConflictError):
        return Refusal(409, str(error), "adapter_conflict", "lora_name")
    if isinstance(error, catalogue.AdaptersBusyError):
        return Refusal(503, str(error), "adapters_busy")
    return Refusal(400, str(error), "invalid_adapter", "lora_path")


def chosen(catalogue: Any, base: str, handler: Any) -> str | None:
    """The adapter that a request selects by model, body field or header; None for the base model.

    Raises:
        Refusal: It names something that is not served, or two adapters.
    """
    from mlx_optiq_ext.adapters import shortened

    offers = {offer.name: offer for offer in catalogue.offers()}
    sources = {offer.source: offer.name for offer in offers.values()}
    wanted: dict[str, str] = {}
    if handler.requested_model not in base_names(base):
        wanted["model"] = handler.requested_model
    if handler.adapter is not None:
        wanted["adapters"] = sources.get(handler.adapter, handler.adapter)
    if handler.headers.get(HEADER):
        wanted[HEADER] = handler.headers[HEADER].strip()
    for field, name in wanted.items():
        if name not in offers:
            known = ", ".join(["default_model", *offers])
            message = f"{field} {shortened(name)} is not served here (served: {known})"
            raise Refusal(404, message, "model_not_found", field)
    if len(set(wanted.values())) > 1:
        named = ", ".join(f"{field} {name!r}" for field, name in wanted.items())
        raise Refusal(400, f"the request names two adapters: {named}", "adapter_conflict")
    if handler.requested_draft_model != "default_model":
        message = "beside adapters the draft model is the server's: leave draft_model out"
        raise Refusal(400, message, "invalid_draft_model", "draft_model")
    return next(iter(wanted.values()), None)


def models(catalogue: Any, base: str, created: int) -> list[dict[str, Any]]:
    """What /v1/models lists: the base model and its adapters."""
    path = Path(base)
    identity = str(path.resolve()) if path.exists() else base
    common = {"object": "model", "created": created, "owned_by": "mlx-lm"}
    return [
        {"id": identity, **common, "root": identity, "parent": None},
        *(
            {"id": offer.name, **common, "root": offer.source, "parent": identity}
            for offer in catalogue.offers()
        ),
    ]


def update(options: Any, base: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Load or unload an adapter for a client; waits until it is done.

    Returns:
        The answer.

    Raises:
        Refusal: The request is wrong.
        OptiqError: The adapter is.
    """
    from mlx_optiq_ext.adapters import Offer, check_name
    from mlx_optiq_ext.lora.forms.location import locate

    name = _text(body, "lora_name")
    if path == UNLOAD:
        options.catalogue.unload(name)
        return {"id": name, "object": "model", "deleted": True}
    check_name(name)
    if name in base_names(base):
        raise Refusal(400, f"{name!r} is the base model's name", "adapter_conflict", "lora_name")
    wanted = _text(body, "lora_path")
    root = options.adapter_dir.resolve()
    try:
        folder = (root / wanted).resolve()
        inside = folder.is_relative_to(root) and folder.is_dir()
    except (OSError, ValueError, RuntimeError):  # a name that no file can have
        inside = False
    if not inside:
        message = "lora_path must name a folder in the server's --optiq-adapter-dir"
        raise Refusal(400, message, "invalid_adapter", "lora_path")
    offer = Offer(name, wanted, locate(folder).folder)
    options.catalogue.load(offer, replace=body.get("load_inplace") is True)
    return {"id": name, "object": "model", "root": wanted}


def read_body(handler: Any) -> dict[str, Any]:
    """The JSON object that a request carries.

    Raises:
        Refusal: It carries none, or too much.
    """
    length = handler.headers.get("Content-Length") or ""
    if not length.isdecimal():
        raise Refusal(411, "Content-Length header is required", "invalid_request")
    if int(length) > LIMIT:
        raise Refusal(413, f"the request is larger than {LIMIT} bytes", "invalid_request")
    try:
        body = json.loads(handler.rfile.read(int(length)))
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refusal(400, "the request is not a JSON object", "invalid_request")
    return body


def answer(handler: Any, status: int, body: dict[str, Any]) -> None:
    """Send a JSON answer."""
    content = json.dumps(body).encode()
    handler._set_completion_headers(status)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)
    handler.wfile.flush()


def _text(body: dict[str, Any], field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not value:
        raise Refusal(400, f"{field} must be a text", "invalid_request", field)
    return value
