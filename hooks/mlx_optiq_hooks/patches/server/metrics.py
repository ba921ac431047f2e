"""``mlx_lm.server``: answers that are counted, and ``/metrics``."""

from collections import Counter
from typing import Any

from mlx_optiq_compat import symbols

from ...commands.server import Serving
from ...commands.serving import Guarded
from ...engine import session


def count_answers(handler: Any) -> None:
    """Count every answer of a connection by its endpoint and status."""
    guarded = session.state(Guarded)
    assert guarded is not None
    metrics, log = guarded.metrics, handler.log_request
    assert metrics is not None

    def counted(code="-", size="-"):
        path = getattr(handler, "path", "")
        metrics.add("requests_total", endpoint=_endpoint(path), status=str(int(code)))
        log(code, size)

    # http.server calls it for each answer.
    handler.log_request = counted


def send(handler: Any) -> None:
    """Answer with all that is counted."""
    from mlx_optiq_ext.serving import metrics

    guarded, serving = session.state(Guarded), session.state(Serving)
    assert guarded is not None
    assert guarded.metrics is not None
    cache = handler.response_generator.prompt_cache
    gauges: dict[tuple[str, metrics.Labels], int] = {}
    if (size := symbols.prompt_cache_bytes(cache)) is not None:
        gauges["prompt_cache_bytes", ()] = size
    if serving is not None:
        states = Counter(state.value for state in serving.catalogue.states().values())
        for state, count in states.items():
            gauges["adapters", (("state", state),)] = count
        for name, (_, count) in serving.catalogue.mounted().items():
            gauges["adapter_uses", (("adapter", name),)] = count
    content = guarded.metrics.text(gauges).encode()
    handler.send_response(200)
    handler.send_header("Content-Type", metrics.CONTENT_TYPE)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)
    handler.wfile.flush()


def _endpoint(path: str) -> str:
    """What a request asked for, one of few: a label's values are kept for good."""
    from mlx_optiq_ext.adapters import requests
    from mlx_optiq_ext.serving import COMPLETIONS, HEALTH, METRICS, MODELS

    path = path.partition("?")[0]
    if path.startswith(f"{MODELS}/"):
        return MODELS
    known = (*COMPLETIONS, HEALTH, METRICS, MODELS, requests.LOAD, requests.UNLOAD)
    return path if path in known else "other"
