"""``mlx_lm.server``: adapters chosen by each request.

A request's handler runs in a thread of its own, the model in another. The handler holds the adapter
for as long as it runs and hands it over with the request; rows of a batch hold theirs themselves.
"""

from urllib.parse import unquote

from mlx_optiq_ext.errors import OptiqError

from ...engine import session
from ...engine.patch import Patch, bind, of
from . import model as server


def _serving():
    """The options of the running server, if it serves adapters."""
    running = session.current()
    options = running.options if running is not None and running.command == "server" else None
    return options if getattr(options, "catalogue", None) is not None else None


@server.ending
def load(wrapped, instance, args, kwargs):
    result = wrapped(*args, **kwargs)
    options = _serving()
    if options is not None and instance.model is not None:
        options.catalogue.attach(instance.model)
    return result


def __init__(wrapped, instance, args, kwargs):
    options = _serving()
    if options is None:
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext.adapters import AdapterPromptCache, MountedAdapter, RequestQueue, active

    def current():
        selection = active()
        return selection if isinstance(selection, MountedAdapter) else None

    call = bind(wrapped, args, kwargs)
    call["prompt_cache"] = AdapterPromptCache(call["prompt_cache"], current)
    result = wrapped(**call)
    # The thread that reads it has started, but nobody puts requests in before this returns.
    instance.requests = RequestQueue(options.catalogue.jobs)
    return result


def _is_batchable(wrapped, instance, args, kwargs):
    options = _serving()
    if options is None:
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext.adapters import activate

    from ...installation import gate

    # mlx-lm asks this of every request right before it takes it into a batch or serves it alone.
    # So what the thread does from here on is for that request, but steps of a batch, which know
    # their rows.
    request = bind(wrapped, args, kwargs)["args"]
    activate(options.catalogue.counterpart(request.optiq_adapter))
    routable = options.catalogue.routable and gate().state("adapters_batched").on
    return wrapped(*args, **kwargs) and routable


def generate(wrapped, instance, args, kwargs):
    if _serving() is None:
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext.adapters import active

    call = bind(wrapped, args, kwargs)
    request = call["generation_args"]
    # One model for all requests: those of different adapters may share a batch.
    request.model.model, request.model.adapter = "default_model", None
    request.optiq_adapter = active()
    return wrapped(**call)


def validate_model_parameters(wrapped, instance, args, kwargs):
    result = wrapped(*args, **kwargs)
    options = _serving()
    if options is not None:
        from ...commands import adapter_requests

        base = instance.response_generator.cli_args.model
        instance.optiq_adapter = adapter_requests.chosen(options.catalogue, base, instance)
    return result


def handle_completion(wrapped, instance, args, kwargs):
    options = _serving()
    if options is None:
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext.adapters import AdapterActivation

    from ...commands import adapter_requests

    if instance.optiq_adapter is None:
        return wrapped(*args, **kwargs)
    try:
        adapter = options.catalogue.acquire(instance.optiq_adapter)
    except OptiqError as error:
        raise adapter_requests.refusal(error) from error
    try:
        with AdapterActivation(adapter):
            return wrapped(*args, **kwargs)
    finally:
        options.catalogue.release(adapter)


def do_POST(wrapped, instance, args, kwargs):
    options = _serving()
    if options is None:
        return wrapped(*args, **kwargs)
    from ...commands import adapter_requests

    base = instance.response_generator.cli_args.model
    updates = (adapter_requests.LOAD, adapter_requests.UNLOAD)
    try:
        if not options.allow_adapter_updates or instance.path not in updates:
            return wrapped(*args, **kwargs)
        body = adapter_requests.read_body(instance)
        try:
            done = adapter_requests.update(options, base, instance.path, body)
        except OptiqError as error:
            raise adapter_requests.refusal(error) from error
        adapter_requests.answer(instance, 200, done)
    except adapter_requests.Refusal as refused:
        adapter_requests.answer(instance, refused.status, refused.body())


def handle_models_request(wrapped, instance, args, kwargs):
    options = _serving()
    if options is None:
        return wrapped(*args, **kwargs)
    from ...commands import adapter_requests

    base = instance.response_generator.cli_args.model
    listed = adapter_requests.models(options.catalogue, base, instance.created)
    # As stock: a name behind the path filters the list.
    wanted = unquote(instance.path.removeprefix("/v1/models")).strip("/")
    data = [each for each in listed if wanted in ("", each["id"].strip("/"))]
    adapter_requests.answer(instance, 200, {"object": "list", "data": data})


#: What the wrappers read and set.
USES = of(
    "mlx_lm.server",
    *(
        f"APIHandler.{name}"
        for name in (
            *("adapter", "created", "requested_draft_model", "requested_model"),
            *("response_generator", "_set_completion_headers"),
        )
    ),
    "GenerationArguments.model",
    "LRUPromptCache",
    "ModelDescription.adapter",
    "ModelDescription.model",
    "ModelProvider.model",
    "ResponseGenerator.cli_args",
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
    _patch(
        "APIHandler.handle_models_request",
        handle_models_request,
        "lists the adapters beside the base model",
    ),
)
