"""``mlx_lm.server``: who may ask what, and answers to what is refused."""

import contextlib
import io
import json
import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ...commands.serving import Guarded
from ...engine import session
from ...engine.patch import Patch, of
from . import audit, metrics

if TYPE_CHECKING:
    from mlx_optiq_ext.serving import Connection, Refusal

connection: ContextVar["Connection | None"] = ContextVar("mlx_optiq_ext_client", default=None)

#: Errors of http.server, such as an unknown method, in OpenAI's form.
_ERRORS = (
    '{"error": {"message": "%(explain)s", "type": "invalid_request_error", "param": null, '
    '"code": "%(code)d"}}'
)


class Refused(BaseException):
    """Carries a refusal past mlx-lm's ``except Exception``."""

    def __init__(self, refusal: "Refusal"):
        super().__init__(str(refusal))
        self.refusal = refusal


def __init__(wrapped, instance, args, kwargs):
    guarded = session.state(Guarded)
    if guarded is None:
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext.serving import Connection, Refusal, turn_away

    guard = guarded.guard
    # http.server's own three arguments come last; it handles the whole connection in here.
    *rest, wire, client, server = args
    # It lets five connections wait to be accepted, and the system resets those beyond.
    server.socket.listen(guard.limits.connections)
    if not guard.slots.take():
        if guarded.metrics is not None:
            guarded.metrics.add("connections_refused_total")
        message = f"the server has {guard.limits.connections} connections: try again"
        busy = Refusal(503, message, "server_busy", headers={"Retry-After": "1"})
        return turn_away(wire, busy.answer())
    client_connection = Connection(wire, guard.limits.patience)
    token = connection.set(client_connection)
    instance.error_message_format = _ERRORS
    instance.error_content_type = "application/json"
    if guarded.metrics is not None:
        metrics.count_answers(instance)
    try:
        return wrapped(*rest, client_connection, client, server, **kwargs)
    finally:
        connection.reset(token)
        client_connection.end()
        guard.slots.give()


def do_GET(wrapped, instance, args, kwargs):
    guarded = session.state(Guarded)
    if guarded is None:
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext.serving import HEALTH, METRICS, MODELS, Refusal

    def get():
        path = instance.path.partition("?")[0]
        guarded.guard.check_host(path, instance.headers)
        guarded.guard.check_key(path, instance.headers)
        if path == METRICS and guarded.metrics is not None:
            return metrics.send(instance)
        if path not in (HEALTH, MODELS) and not path.startswith(f"{MODELS}/"):
            raise Refusal(404, "there is nothing at this path", "not_found")
        if path == HEALTH:
            instance.path = path  # mlx-lm knows it without a query only
        return wrapped(*args, **kwargs)

    return _guarded(instance, get)


def do_POST(wrapped, instance, args, kwargs):
    from mlx_optiq_ext.serving import (
        COMPLETIONS,
        Refusal,
        check_bounds,
        check_text,
        read_object,
    )

    guarded = session.state(Guarded)
    if guarded is None:
        try:
            return wrapped(*args, **kwargs)
        except Refusal as refusal:
            return _answer(instance, refusal)

    def post():
        guarded.guard.check_host(instance.path, instance.headers)
        guarded.guard.check_key(instance.path, instance.headers)
        if instance.path not in (*COMPLETIONS, *changing()):
            raise Refusal(404, "there is nothing at this path", "not_found")
        if instance.response_generator.optiq_waiting.dead:
            raise dead()
        if instance.path in changing():
            guarded.guard.check_change(instance.headers, instance.client_address[0])
        length = guarded.guard.check_length(instance.headers)
        content = instance.rfile.read(length)
        if len(content) < length:
            raise Refusal(400, "the request is shorter than its Content-Length", "invalid_request")
        if instance.path in COMPLETIONS:
            body = read_object(content)
            check_text(instance.path, body)
            check_bounds(body)
        instance.rfile = io.BytesIO(content)
        return wrapped(*args, **kwargs)

    if instance.path in changing():
        return _guarded(instance, lambda: audit.change(instance, post))
    return _guarded(instance, post)


def dead() -> "Refusal":
    """The answer of a server whose generation thread has died."""
    from mlx_optiq_ext.serving import Refusal

    return Refusal(503, "the server must be started anew", "server_dead")


def changing() -> tuple[str, ...]:
    """The paths that change the running server."""
    from mlx_optiq_ext.adapters import requests

    from ...commands.server import Serving

    serving = session.state(Serving)
    return () if serving is None or serving.updates is None else (requests.LOAD, requests.UNLOAD)


def _set_cors_headers(wrapped, instance, args, kwargs):
    guarded = session.state(Guarded)
    if guarded is None or not guarded.guard.own_pages:
        return wrapped(*args, **kwargs)
    instance.send_header("Vary", "Origin")
    if guarded.guard.lets_read(instance.headers.get("Origin")):
        wrapped(*args, **kwargs)


def handle_models_request(wrapped, instance, args, kwargs):
    guarded = session.state(Guarded)
    if guarded is None:
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext.adapters import requests

    from ...commands.server import Serving

    serving = session.state(Serving)
    offers = () if serving is None else serving.catalogue.offers()
    listed = requests.listing(offers, guarded.base, instance.created)
    # Like stock: a name after the path filters the list.
    path = instance.path.partition("?")[0]
    wanted = unquote(path.removeprefix("/v1/models")).strip("/")
    data = [each for each in listed if wanted in ("", each["id"].strip("/"))]
    send(instance, 200, {"object": "list", "data": data})


def _guarded(handler: Any, serve) -> None:
    """Serve a request; what goes wrong before an answer was begun is answered in OpenAI's form."""
    from mlx_optiq_ext.serving import Refusal

    try:
        return serve()
    except Refusal as refusal:
        refused = refusal
    except Refused as carrier:
        refused = carrier.refusal
    except TimeoutError:
        refused = Refusal(408, "the request did not arrive in time", "timeout")
    except ConnectionError as error:
        logging.info(f"a client left: {error}")
        handler.close_connection = True
        return None
    except Exception:
        logging.exception("mlx_lm.server: a request failed")
        refused = Refusal(500, "the request failed: see the server's log", "internal_error")
    handler.close_connection = True
    if handler.connection.sent:
        return None
    with contextlib.suppress(OSError):
        _answer(handler, refused)
    return None


def _answer(handler: Any, refusal: "Refusal") -> None:
    from mlx_optiq_ext.serving import drain

    # Headers that were prepared for another answer.
    handler._headers_buffer = []
    send(handler, refusal.status, refusal.body(), refusal.headers)
    drain(handler.connection)


def send(handler: Any, status: int, body: dict[str, Any], headers=None) -> None:
    """Send a JSON answer."""
    content = json.dumps(body).encode()
    handler._set_completion_headers(status)
    for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)
    handler.wfile.flush()


def _patch(attribute: str, wrapper, why: str) -> Patch:
    return Patch(
        f"mlx_lm.server:{attribute}",
        feature="serving",
        why=why,
        upstream="none: mlx-lm recommends its server for no production (server.py)",
        wrapper=wrapper,
        uses=of("mlx_lm.server", "APIHandler._set_completion_headers", "APIHandler.created"),
    )


PATCHES = (
    _patch("APIHandler.__init__", __init__, "limits connections and the time that each takes"),
    _patch("APIHandler.do_GET", do_GET, "asks for a key"),
    _patch("APIHandler.do_POST", do_POST, "asks for a key, and answers what is refused"),
    _patch(
        "APIHandler._set_cors_headers",
        _set_cors_headers,
        "hides adapters from web pages of other hosts",
    ),
    _patch(
        "APIHandler.handle_models_request",
        handle_models_request,
        "lists what is served, without folders",
    ),
)
