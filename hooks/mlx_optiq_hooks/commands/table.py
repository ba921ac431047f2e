"""The stock commands, and which file of this folder adds options to each."""

from collections.abc import Mapping

from ..engine.flags import Command
from . import benchmark, convert, evaluate, kv, lora, server, serving

#: For commands whose only option is --optiq-kv.
_RUNS_A_MODEL = Command(kv.add_arguments, kv.check)

COMMANDS: Mapping[str, Command] = {
    "benchmark": Command(benchmark.add_arguments, benchmark.check),
    "cache_prompt": _RUNS_A_MODEL,
    "chat": _RUNS_A_MODEL,
    "convert": Command(convert.add_arguments, convert.check, interrupted=convert.interrupted),
    "evaluate": Command(
        evaluate.add_arguments, evaluate.check, evaluate.REPLACED, evaluate.interrupted
    ),
    "fuse": Command(),
    "generate": _RUNS_A_MODEL,
    "lora": Command(lora.add_arguments, lora.check, interrupted=lora.interrupted),
    "perplexity": _RUNS_A_MODEL,
    "server": Command(
        server.add_arguments,
        server.check,
        interrupted=None,
        environment={"api_key": serving.KEY_VARIABLE},
    ),
}
