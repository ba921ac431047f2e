"""``mlx_lm.server``: adapters chosen by each request.

Each request has a handler thread; the model runs in the generation thread. The handler keeps its
adapters in use while it runs, and passes them on with the request. Rows of a batch keep their own.
"""

from mlx_optiq_ext.errors import OptiqError

from ...commands.server import Serving
from ...engine import session
from ...engine.patch import Patch, bind, of
from . import audit, guard
from . import model as server


@server.ending
def load(wrapped, instance, args, kwargs):
    result, serving = wrapped(*args, **kwargs), session.state(Serving)
    if serving is not None and instance.model is not None:
        serving.catalogue.attach(instance.model)
    return result


def __init__(wrapped, instance, args, kwargs):
    serving = session.state(Serving)
    if serving is None:
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext.adapters import (
        AdapterPromptCache,
        Mixture,
        MountedAdapter,
        RequestQueue,
        active,
    )

    def current():
        selection = active()
        return selection if isinstance(selection, MountedAdapter | Mixture) else None

    call = bind(wrapped, args, kwargs)
    call["prompt_cache"] = AdapterPromptCache(call["prompt_cache"], current)
    result = wrapped(**call)
    # The generation thread has started, but no request arrives before this returns.
    instance.requests = RequestQueue(serving.catalogue.jobs)
    return result


def _is_batchable(wrapped, instance, args, kwargs):
    serving = session.state(Serving)
    if serving is None:
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext.adapters import activate, counterpart

    from ...installation import gate

    # mlx-lm calls this for every request right before it serves it, in a batch or alone. From here
    # on the thread works for that request, except in steps of a batch, which use their own routes.
    request = bind(wrapped, args, kwargs)["args"]
    activate(counterpart(instance.model_provider.model, request.optiq_adapter))
    routable = serving.catalogue.routable and gate().state("adapters_batched").on
    return wrapped(*args, **kwargs) and routable


def generate(wrapped, instance, args, kwargs):
    if session.state(Serving) is None:
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext.adapters import active

    call = bind(wrapped, args, kwargs)
    request = call["generation_args"]
    # All requests name one model, so that those of different adapters may share a batch.
    request.model.model, request.model.adapter = "default_model", None
    request.optiq_adapter = active()
    return wrapped(**call)


def validate_model_parameters(wrapped, instance, args, kwargs):
    result, serving = wrapped(*args, **kwargs), session.state(Serving)
    if serving is not None:
        from mlx_optiq_ext.adapters import Wanted, requests

        wanted = Wanted(
            model=instance.requested_model,
            adapters=instance.adapter,
            # Of a header that is there twice, both are meant.
            header=", ".join(instance.headers.get_all(requests.HEADER) or []),
            draft_model=instance.requested_draft_model,
            lora=instance.body.get("lora"),
        )
        instance.optiq_adapter = requests.select(serving.catalogue.offers(), serving.base, wanted)
    return result


def handle_completion(wrapped, instance, args, kwargs):
    serving = session.state(Serving)
    if serving is None or instance.optiq_adapter is None:
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext.adapters import AdapterActivation, mixed, refusal
    from mlx_optiq_ext.serving import Refusal, at_end, once

    selected = instance.optiq_adapter
    try:
        adapters = serving.catalogue.acquire_all(list(selected.scales))
    except OptiqError as error:
        folders = [each.folder for each in serving.catalogue.offers()]
        raise refusal(error, selected.field, *folders) from error
    # A row ends before its client has read the answer, which may take as long as it likes.
    release = once(lambda: serving.catalogue.release(*adapters))
    try:
        try:
            mixture = mixed(zip(adapters, selected.scales.values(), strict=True))
        except OptiqError as error:  # names of the same weights, whose scales add up
            raise Refusal(400, str(error), "invalid_value", selected.field) from error
        with AdapterActivation(mixture), at_end(release):
            return wrapped(*args, **kwargs)
    finally:
        release()


def do_POST(wrapped, instance, args, kwargs):
    serving = session.state(Serving)
    if serving is None or instance.path not in guard.changing():
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext.adapters import requests

    assert serving.updates is not None
    body = requests.read_body(instance.headers.get("Content-Length"), instance.rfile)
    audit.note(instance, body)
    done = requests.update(serving.catalogue, serving.base, serving.updates, instance.path, body)
    instance.optiq_changed = True
    audit.note(instance, body)
    guard.send(instance, 200, done)


#: Names of mlx_lm.server that the wrappers read or set.
USES = of(
    "mlx_lm.server",
    *(
        f"APIHandler.{name}"
        for name in (
            *("adapter", "body", "requested_draft_model", "requested_model"),
            "response_generator",
        )
    ),
    "GenerationArguments.model",
    "LRUPromptCache",
    "ModelDescription.adapter",
    "ModelDescription.model",
    "ModelProvider.model",
    "ResponseGenerator.cli_args",
    "ResponseGenerator.model_provider",
    "ResponseGenerator.prompt_cache",
    "ResponseGenerator.requests",
)


def _patch(attribute: str, wrapper, why: str) -> Patch:
    return Patch(
        f"mlx_lm.server:{attribute}",
        feature="adapters",
        why=why,
        upstream="none: another adapter loads the model anew (server.py)",
        wrapper=wrapper,
        uses=USES,
    )


PATCHES = (
    _patch("ModelProvider.load", load, "mounts the adapters on the served model"),
    _patch("ResponseGenerator.__init__", __init__, "keeps prompt caches of adapters apart"),
    _patch("ResponseGenerator._is_batchable", _is_batchable, "uses the adapter of a request"),
    _patch("ResponseGenerator.generate", generate, "sends the adapter along with a request"),
    _patch(
        "APIHandler.validate_model_parameters",
        validate_model_parameters,
        "finds out which adapter a request selects",
    ),
    _patch("APIHandler.handle_completion", handle_completion, "holds a request's adapter"),
    _patch("APIHandler.do_POST", do_POST, "answers requests about adapters"),
)
