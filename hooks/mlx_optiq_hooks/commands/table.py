"""The stock commands, and which file of this folder adds options to each."""

from collections.abc import Mapping

from ..engine.flags import Command
from . import benchmark, convert, evaluate, kv, lora, prompts, server, serving

#: For commands that answer a prompt.
_ANSWERS = Command(prompts.add_with_kv, prompts.check_with_kv)

COMMANDS: Mapping[str, Command] = {
    "benchmark": Command(benchmark.add_arguments, benchmark.check),
    "cache_prompt": _ANSWERS,
    "chat": _ANSWERS,
    "convert": Command(convert.add_arguments, convert.check, interrupted=convert.interrupted),
    "evaluate": Command(
        evaluate.add_arguments, evaluate.check, evaluate.REPLACED, evaluate.interrupted
    ),
    "fuse": Command(),
    "generate": _ANSWERS,
    "lora": Command(lora.add_arguments, lora.check, interrupted=lora.interrupted),
    "perplexity": Command(kv.add_arguments, kv.check),
    "server": Command(
        server.add_arguments,
        server.check,
        interrupted=None,
        environment={"api_key": serving.KEY_VARIABLE},
    ),
}
