"""Selects a request's adapter, and answers in OpenAI's form if it cannot be served."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .. import files
from ..errors import InputError, OptiqError
from ..lora.forms.location import locate
from .catalogue import (
    AdapterConflictError,
    AdaptersBusyError,
    Catalogue,
    Offer,
    UnknownAdapterError,
)
from .naming import DEFAULT_MODEL, base_names, check_name, shortened

#: Header that selects an adapter.
HEADER = "X-OptIQ-Adapter"
#: Paths that load and unload one.
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
#: Bytes of a request to load or unload an adapter.
LIMIT = 1 << 16


@dataclass
class Refusal(Exception):
    """A request that is answered with an error.

    Attributes:
        status: The status code of HTTP.
        message: For the client.
        code: OpenAI's code.
        param: The field that is wrong, or None.
    """

    status: int
    message: str
    code: str
    param: str | None = None

    @classmethod
    def of(cls, error: OptiqError) -> "Refusal":
        """The answer to an error of the catalogue."""
        if isinstance(error, UnknownAdapterError):
            return cls(404, str(error), "model_not_found", "model")
        if isinstance(error, AdapterConflictError):
            return cls(409, str(error), "adapter_conflict", "lora_name")
        if isinstance(error, AdaptersBusyError):
            return cls(503, str(error), "adapters_busy")
        return cls(400, str(error), "invalid_adapter", "lora_path")

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}


@dataclass(frozen=True)
class Wanted:
    """The fields of a completion request that select a model.

    Attributes:
        model: The field ``model``.
        adapters: The field ``adapters``, a name or a source; None if absent.
        header: The header `HEADER`; None if absent.
        draft_model: The field ``draft_model``.
    """

    model: str = DEFAULT_MODEL
    adapters: str | None = None
    header: str | None = None
    draft_model: str = DEFAULT_MODEL


def select(catalogue: Catalogue, base: str, wanted: Wanted) -> str | None:
    """The adapter that a request selects; None for the base model.

    Args:
        catalogue: The served adapters.
        base: The base model's folder or name.
        wanted: The request's fields.

    Raises:
        Refusal: The request names something that is not served, or two adapters.
    """
    offers = {offer.name: offer for offer in catalogue.offers()}
    sources = {offer.source: offer.name for offer in offers.values()}
    named: dict[str, str] = {}
    if wanted.model not in base_names(base):
        named["model"] = wanted.model
    if wanted.adapters is not None:
        named["adapters"] = sources.get(wanted.adapters, wanted.adapters)
    if wanted.header:
        named[HEADER] = wanted.header.strip()
    for field, name in named.items():
        if name not in offers:
            known = ", ".join([DEFAULT_MODEL, *offers])
            message = f"{field} {shortened(name)} is not served here (served: {known})"
            raise Refusal(404, message, "model_not_found", field)
    if len(set(named.values())) > 1:
        both = ", ".join(f"{field} {name!r}" for field, name in named.items())
        raise Refusal(400, f"the request names two adapters: {both}", "adapter_conflict")
    if wanted.draft_model != DEFAULT_MODEL:
        message = "beside adapters the draft model is the server's: leave draft_model out"
        raise Refusal(400, message, "invalid_draft_model", "draft_model")
    return next(iter(named.values()), None)


def listing(catalogue: Catalogue, base: str, created: int) -> list[dict[str, Any]]:
    """OpenAI's model objects of the base model and its adapters.

    Args:
        catalogue: The served adapters.
        base: The base model's folder or name.
        created: Unix time.
    """
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


def update(
    catalogue: Catalogue, base: str, folder: Path, path: str, body: Mapping[str, Any]
) -> dict[str, Any]:
    """Load or unload an adapter for a client; waits until it is done.

    Args:
        catalogue: The served adapters; changed.
        base: The base model's folder or name.
        folder: Clients load adapters from folders in it only.
        path: `LOAD` or `UNLOAD`.
        body: ``lora_name``, and to load also ``lora_path`` and ``load_inplace``.

    Returns:
        The answer.

    Raises:
        Refusal: The request is wrong.
        OptiqError: The adapter is unusable.
    """
    name = _text(body, "lora_name")
    if path == UNLOAD:
        catalogue.unload(name)
        return {"id": name, "object": "model", "deleted": True}
    check_name(name)
    if name in base_names(base):
        raise Refusal(400, f"{name!r} is the base model's name", "adapter_conflict", "lora_name")
    wanted = _text(body, "lora_path")
    root = folder.resolve()
    try:
        found = (root / wanted).resolve()
        inside = found.is_relative_to(root) and found.is_dir()
    except (OSError, ValueError, RuntimeError):  # such as a name with a null byte
        inside = False
    if not inside:
        message = "lora_path must name a folder in the server's --optiq-adapter-dir"
        raise Refusal(400, message, "invalid_adapter", "lora_path")
    offer = Offer(name, wanted, locate(found).folder)
    catalogue.load(offer, replace=body.get("load_inplace") is True)
    return {"id": name, "object": "model", "root": wanted}


def read_body(length: str | None, stream: BinaryIO) -> dict[str, Any]:
    """The JSON object that a request carries.

    Args:
        length: The header Content-Length; None if absent.
        stream: The body.

    Raises:
        Refusal: There is no JSON object, or more than `LIMIT` bytes.
    """
    length = length or ""
    if not length.isdecimal():
        raise Refusal(411, "Content-Length header is required", "invalid_request")
    if len(length) > 18 or int(length) > LIMIT:
        raise Refusal(413, f"the request is larger than {LIMIT} bytes", "invalid_request")
    try:
        body = files.parse_json(stream.read(int(length)), "the request", files.REQUEST)
    except InputError:
        body = None
    if not isinstance(body, dict):
        raise Refusal(400, "the request is not a JSON object", "invalid_request")
    return body


def _text(body: Mapping[str, Any], field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not value:
        raise Refusal(400, f"{field} must be a text", "invalid_request", field)
    return value
