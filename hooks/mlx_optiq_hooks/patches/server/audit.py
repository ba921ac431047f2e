"""``mlx_lm.server``: one line in the log for each request to load or unload an adapter."""

import logging
from typing import Any

from ...commands.server import Serving
from ...commands.serving import Guarded
from ...engine import session


def change(handler: Any, serve) -> None:
    """Serve a request to change the server, and say who wanted what and how it ended."""
    from mlx_optiq_ext.adapters import requests
    from mlx_optiq_ext.serving import Refusal, record

    guarded = session.state(Guarded)
    assert guarded is not None
    keys, shown = guarded.guard.keys, handler.headers.get("Authorization")
    action = "load" if handler.path == requests.LOAD else "unload"
    # Filled in by whoever reads the request's body, and serves it.
    handler.optiq_change, handler.optiq_changed = {}, False
    status, code = 500, None
    try:
        serve()
        status = 200
    except Refusal as refusal:
        status, code = refusal.status, refusal.code
        raise
    except TimeoutError:
        status = 408
        raise
    except ConnectionError:  # nobody is there to answer
        status = None
        raise
    finally:
        if handler.optiq_changed:  # whether or not its client took the answer
            status = 200
        who = {
            "client": handler.client_address[0],
            "key": None if keys is None else keys.number(shown),
        }
        logging.info(
            record(action, **who, **handler.optiq_change, status=status, code=code),
        )


def note(handler: Any, body: dict[str, Any]) -> None:
    """Note what a request wants to change, and the weights of that name, if there are any."""
    serving = session.state(Serving)
    assert serving is not None
    seen = {each: body.get(field) for each, field in NAMED.items()}
    found = {name: value for name, value in seen.items() if isinstance(value, str)}
    mounted = serving.catalogue.mounted().get(found.get("adapter", ""))
    if mounted is not None:
        found["digest"] = mounted[0].version
    handler.optiq_change |= found


#: Name in the log -> field of the request.
NAMED = {"adapter": "lora_name", "path": "lora_path"}
