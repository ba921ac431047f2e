"""Selects a request's adapter, and answers in OpenAI's form if it cannot be served."""

from collections.abc import Iterable, Mapping, Sequence
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
from .mixture import check_scale
from .naming import DEFAULT_MODEL, base_names, check_name, public_name, shortened

#: Header that selects an adapter.
HEADER = "X-OptIQ-Adapter"
#: Paths that load and unload one.
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
#: The field that names an adapter -> the one that names its files.
PATHS = {"lora_name": "lora_path"}
#: Adapters that one request may name.
MOST = 16
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
        lora: The field ``lora``: objects with ``id``, a name, and ``scale``; None if absent.
    """

    model: str = DEFAULT_MODEL
    adapters: str | None = None
    header: str | None = None
    draft_model: str = DEFAULT_MODEL
    lora: Any = None


@dataclass(frozen=True)
class Selected:
    """The adapters that a request selects.

    Attributes:
        scales: Scales by name, none of them 0.
        field: The field or header that named them.
    """

    scales: Mapping[str, float]
    field: str


def select(offered: Iterable[Offer], base: str, wanted: Wanted) -> Selected | None:
    """The adapters that a request selects; None for the base model.

    Every field may name several, joined by ``+``; an adapter whose own name has one comes first.
    ``lora`` gives them scales. Fields that name adapters must agree.

    Args:
        offered: The served adapters.
        base: The base model's folder or name.
        wanted: The request's fields.

    Raises:
        Refusal: The request names something that is not served, its fields disagree, or ``lora``
            is wrong.
    """
    offers = {offer.name: offer for offer in offered}
    sources = {offer.source: offer.name for offer in offers.values()}
    texts: dict[str, str] = {}
    known = base_names(base)
    if wanted.model not in known:
        texts["model"] = wanted.model
    if wanted.adapters is not None:
        texts["adapters"] = sources.get(wanted.adapters, wanted.adapters)
    if wanted.header:
        texts[HEADER] = wanted.header.strip()
    named: dict[str, dict[str, float]] = {}
    for field, text in texts.items():
        if text in known:
            named[field] = {}
            continue
        names = [text] if text in offers else text.split("+", MOST)
        if not all(name in offers for name in names):
            raise _not_served(f"{field} {shortened(text)}", field, base, offers)
        named[field] = _distinct([(name, 1.0) for name in names], field)
    if wanted.lora is not None:
        named["lora"] = _scales(wanted.lora, base, offers)
    chosen = [{n: s for n, s in each.items() if s} for each in named.values()]
    if any(each != chosen[0] for each in chosen):
        both = ", ".join(f"{field} {_shown(scales)}" for field, scales in named.items())
        raise Refusal(400, f"the request names two adapters: {both}", "adapter_conflict")
    if wanted.draft_model != DEFAULT_MODEL:
        message = "the draft model is the server's: leave draft_model out"
        raise Refusal(400, message, "invalid_draft_model", "draft_model")
    return Selected(chosen[0], next(iter(named))) if any(chosen) else None


def _scales(lora: Any, base: str, offers: Mapping[str, Offer]) -> dict[str, float]:
    """Scales by name of the field ``lora``."""
    if not isinstance(lora, list):
        raise _wrong('lora must be a list of objects such as {"id": "name", "scale": 0.5}')
    found: list[tuple[str, float]] = []
    for number, entry in enumerate(lora):
        if not isinstance(entry, dict) or entry.keys() != {"id", "scale"}:
            raise _wrong(f"lora[{number}] must be an object with id and scale")
        name = entry["id"]
        if not isinstance(name, str):
            raise _wrong(f"lora[{number}].id must be the name of an adapter")
        if name not in offers:
            raise _not_served(f"lora[{number}].id {shortened(name)}", "lora", base, offers)
        try:
            found.append((name, check_scale(entry["scale"])))
        except InputError as error:
            raise _wrong(f"lora[{number}].scale: {error}") from error
    return _distinct(found, "lora")


def _distinct(members: Sequence[tuple[str, float]], field: str) -> dict[str, float]:
    if len(members) > MOST:
        raise _wrong(f"{field} names more than {MOST} adapters", field)
    scales = dict(members)
    if len(scales) < len(members):
        raise _wrong(f"{field} names an adapter twice", field)
    return scales


def _wrong(message: str, field: str = "lora") -> Refusal:
    return Refusal(400, message, "invalid_value", field)


def _not_served(what: str, field: str, base: str, offers: Iterable[str]) -> Refusal:
    known = ", ".join([public_name(base), *offers])
    return Refusal(404, f"{what} is not served here (served: {known})", "model_not_found", field)


def _shown(scales: Mapping[str, float]) -> str:
    parts = (name if scale == 1 else f"{scale:g}*{name}" for name, scale in scales.items())
    return repr("+".join(parts))


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
