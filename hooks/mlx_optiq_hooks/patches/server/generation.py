"""``mlx_lm.server``: what reaches the thread that generates, and what is left when it dies.

Without options of ours only requests that stock does not survive are refused.
"""

import copy
import inspect

from ...commands.server import Serving
from ...commands.serving import Guarded
from ...engine import session
from ...engine.patch import Patch, bind, of
from . import guard


def validate_model_parameters(wrapped, instance, args, kwargs):
    from mlx_optiq_ext.serving import Refusal, check, vocabulary_of

    guarded = session.state(Guarded)
    vocabulary = vocabulary_of(instance.response_generator.model_provider.model)
    try:
        result = wrapped(*args, **kwargs)
    except (ValueError, TypeError, OverflowError) as error:
        if guarded is None and isinstance(error, ValueError):
            raise  # mlx-lm's own answer
        check({**instance.body, **vars(instance)}, vocabulary)
        if guarded is None:
            raise
        message = str(error).removeprefix("requested_")
        name = message.partition(" ")[0]
        param = {"adapter": "adapters"}.get(name, name)
        found = param if param in instance.body else None
        raise Refusal(400, message, "invalid_value", found) from error
    check({**instance.body, **vars(instance)}, vocabulary)
    if guarded is not None:
        from mlx_optiq_ext.adapters import requests

        if session.state(Serving) is None:
            named = instance.adapter
            adapters = None if named == guarded.adapter_path else named
            wanted = requests.Wanted(
                instance.requested_model,
                adapters,
                draft_model=instance.requested_draft_model,
                lora=instance.body.get("lora"),
            )
            requests.select((), guarded.base, wanted)
            # What stock takes for the model that it was started with.
            instance.requested_model = "default_model"
    return result


def handle_completion(wrapped, instance, args, kwargs):
    # A client's stream_options are looked at after the whole stream was sent.
    options = instance.stream_options if instance.stream else None
    if options is not None and not (isinstance(options, dict) and "include_usage" in options):
        from mlx_optiq_ext.serving import Refusal

        if options != {}:
            message = "stream_options must have include_usage"
            raise Refusal(400, message, "invalid_value", "stream_options")
        instance.stream_options = None
    return wrapped(*args, **kwargs)


def generate_response(wrapped, instance, args, kwargs):
    response = wrapped(*args, **kwargs)
    if session.state(Guarded) is None:
        return response
    from mlx_optiq_ext.serving import finite

    return finite(response)


def handle_health_check(wrapped, instance, args, kwargs):
    waiting = getattr(instance.response_generator, "optiq_waiting", None)
    if waiting is None or not waiting.dead:
        return wrapped(*args, **kwargs)
    # Older releases say "ok" for as long as the process lives.
    guard.send(instance, 503, {"status": "unavailable"})


def __init__(wrapped, instance, args, kwargs):
    from mlx_optiq_ext.serving import Waiting

    # Before the generation thread starts.
    instance.optiq_waiting = Waiting()
    result = wrapped(*args, **kwargs)
    instance.optiq_waiting.follow(instance.requests)
    return result


def _generate(wrapped, instance, args, kwargs):
    try:
        return wrapped(*args, **kwargs)
    except BaseException:
        instance.optiq_waiting.end()
        serving = session.state(Serving)
        if serving is not None:
            serving.catalogue.jobs.end(guard.dead())
        raise


def _tokenize(wrapped, instance, args, kwargs):
    from mlx_optiq_ext.serving import check, check_prompt, vocabulary_of

    result, request = wrapped(*args, **kwargs), bind(wrapped, args, kwargs).get("args")
    check_prompt(result[0] if isinstance(result, tuple) else result)
    if request is not None:
        # The model may have been loaded, or exchanged, after the request was read.
        parts = {**vars(request.sampling), **vars(request.logits)}
        check(parts, vocabulary_of(instance.model_provider.model))
    return result


def generate(wrapped, instance, args, kwargs):
    guarded, client = session.state(Guarded), guard.connection.get()
    call = bind(wrapped, args, kwargs)
    if guarded is None or client is None:
        _try_to_tokenize(instance, call["request"])
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext.serving import Refusal, Row, at_end, without_folders

    row = Row(guarded.metrics)
    dead = guard.Refused(guard.dead())
    progress = call.get("progress_callback")

    def reported(*numbers):
        client.check()
        if progress is not None:
            progress(*numbers)

    try:
        _try_to_tokenize(instance, call["request"])
        with at_end(row.end):
            context, answers = wrapped(**{**call, "progress_callback": reported})
    except Refusal as refusal:
        raise guard.Refused(refusal) from refusal
    except Exception as error:
        if instance.optiq_waiting.dead:
            raise dead from error
        field = "messages" if call["request"].request_type == "chat" else "prompt"
        message = f"the request cannot be served: {without_folders(str(error))}"
        raise guard.Refused(Refusal(400, message, "invalid_request", field)) from error

    # A client that has left already gets no headers, and its answers are never asked for.
    client.at_end(context.stop)
    row.serve(len(context.prompt))

    def watched():
        try:
            for answer in answers:
                client.check()
                row.token(getattr(context, "prompt_cache_count", 0))
                yield answer
        except RuntimeError as error:
            raise (dead if instance.optiq_waiting.dead else error) from error
        finally:
            context.stop()
            row.end()

    return context, watched()


def _try_to_tokenize(generator, request) -> None:
    """Find out in the request's thread whether it can be tokenized.

    In older releases, whose method takes no arguments of the request, an error in the generation
    thread ends that.
    """
    tokenizer = generator.model_provider.tokenizer
    if tokenizer is None or "args" in inspect.signature(generator._tokenize).parameters:
        return
    generator._tokenize(tokenizer, copy.deepcopy(request))  # it changes messages


#: Names of mlx_lm.server that the wrappers read or set.
USES = of(
    "mlx_lm.server",
    *(
        f"APIHandler.{name}"
        for name in (
            *("adapter", "body", "requested_draft_model", "requested_model"),
            *("response_generator", "stream", "stream_options"),
        )
    ),
    "CompletionRequest.request_type",
    "GenerationArguments.logits",
    "GenerationArguments.sampling",
    "GenerationContext.prompt",
    "GenerationContext.stop",
    "ModelProvider.model",
    "ModelProvider.tokenizer",
    "ResponseGenerator.model_provider",
    "ResponseGenerator.requests",
)


def _patch(attribute: str, wrapper, why: str) -> Patch:
    return Patch(
        f"mlx_lm.server:{attribute}",
        feature="serving",
        why=why,
        upstream="none: an exception ends the generation thread (server.py)",
        wrapper=wrapper,
        uses=USES,
    )


PATCHES = (
    _patch(
        "APIHandler.validate_model_parameters",
        validate_model_parameters,
        "refuses parameters that would end the generation thread",
    ),
    _patch(
        "APIHandler.handle_completion",
        handle_completion,
        "refuses unusable stream_options first",
    ),
    _patch("APIHandler.generate_response", generate_response, "answers in strict JSON"),
    _patch("APIHandler.handle_health_check", handle_health_check, "says so after that thread died"),
    _patch("ResponseGenerator.__init__", __init__, "knows the requests that wait"),
    _patch("ResponseGenerator._generate", _generate, "ends them when their thread dies"),
    _patch("ResponseGenerator._tokenize", _tokenize, "refuses prompts that would end the thread"),
    _patch("ResponseGenerator.generate", generate, "ends the row of a client that left"),
)
