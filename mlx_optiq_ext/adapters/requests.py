"""Selects a request's adapter, and answers in OpenAI's form if it cannot be served."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .. import files
from ..errors import InputError, OptiqError
from ..serving import Refusal, without_folders
from .catalogue import (
    AdapterConflictError,
    AdaptersBusyError,
    Catalogue,
    Offer,
    UnknownAdapterError,
)
from .naming import DEFAULT_MODEL, base_names, check_name, public_name, shortened

#: Header that selects an adapter.
HEADER = "X-OptIQ-Adapter"
#: Paths that load and unload one.
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
#: The field that names an adapter -> the one that names its files.
PATHS = {"lora_name": "lora_path"}
#: Bytes of a request to load or unload an adapter.
LIMIT = 1 << 16


def refusal(error: OptiqError, field: str, *folders: str | Path) -> Refusal:
    """The answer to an error of the catalogue.

    Args:
        error: The error.
        field: The request's field that names the adapter.
        folders: Folders that the error may name; clients do not see where they are.
    """
    if isinstance(error, UnknownAdapterError):
        return Refusal(404, str(error), "model_not_found", field)
    if isinstance(error, AdapterConflictError):
        return Refusal(409, str(error), "adapter_conflict", field)
    if isinstance(error, AdaptersBusyError):
        return Refusal(503, str(error), "adapters_busy", headers={"Retry-After": "1"})
    # Its files are wrong: where to load from is in lora_path.
    message = without_folders(str(error), *folders)
    return Refusal(400, message, "invalid_adapter", PATHS.get(field, field))


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


@dataclass(frozen=True)
class Selected:
    """An adapter that a request selects.

    Attributes:
        name: The adapter's name.
        field: The field or header that named it.
    """

    name: str
    field: str


def select(offered: Iterable[Offer], base: str, wanted: Wanted) -> Selected | None:
    """The adapter that a request selects; None for the base model.

    Args:
        offered: The served adapters.
        base: The base model's folder or name.
        wanted: The request's fields.

    Raises:
        Refusal: The request names something that is not served, or two adapters.
    """
    offers = {offer.name: offer for offer in offered}
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
            known = ", ".join([public_name(base), *offers])
            message = f"{field} {shortened(name)} is not served here (served: {known})"
            raise Refusal(404, message, "model_not_found", field)
    if len(set(named.values())) > 1:
        both = ", ".join(f"{field} {name!r}" for field, name in named.items())
        raise Refusal(400, f"the request names two adapters: {both}", "adapter_conflict")
    if wanted.draft_model != DEFAULT_MODEL:
        message = "the draft model is the server's: leave draft_model out"
        raise Refusal(400, message, "invalid_draft_model", "draft_model")
    return next((Selected(name, field) for field, name in named.items()), None)


def listing(offered: Iterable[Offer], base: str, created: int) -> list[dict[str, Any]]:
    """OpenAI's model objects of the base model and its adapters.

    Args:
        offered: The served adapters.
        base: The base model's folder or name.
        created: Unix time.
    """
    identity = public_name(base)
    common = {"object": "model", "created": created, "owned_by": "mlx-lm"}
    return [
        {"id": identity, **common, "root": identity, "parent": None},
        *(
            {"id": offer.name, **common, "root": public_name(offer.source), "parent": identity}
            for offer in offered
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
        Refusal: The request is wrong, or the adapter unusable.
    """
    name = _text(body, "lora_name")
    try:
        return _update(catalogue, base, folder, path, name, body)
    except OptiqError as error:
        raise refusal(error, "lora_name", folder, folder.resolve()) from error


def _update(
    catalogue: Catalogue, base: str, folder: Path, path: str, name: str, body: Mapping[str, Any]
) -> dict[str, Any]:
    if path == UNLOAD:
        catalogue.unload(name)
        return {"id": name, "object": "model", "deleted": True}
    try:
        check_name(name)
    except InputError as error:
        raise Refusal(400, str(error), "invalid_adapter", "lora_name") from error
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
    offer = Offer(name, wanted, found, closed=True)
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
