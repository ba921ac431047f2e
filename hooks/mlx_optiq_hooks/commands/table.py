"""The stock commands, and which file of this folder adds options to each."""

from collections.abc import Mapping

from ..engine.command import Command
from . import benchmark, convert, evaluate, kv, lora, prompts, server, serving

_KV = {"KV cache": ("kv",)}
_PROMPTS = {"prompts on disk": ("prompt_cache", "prompt_cache_size")}
#: For commands that answer a prompt.
_ANSWERS = Command(prompts.add_with_kv, prompts.check_with_kv, groups=_KV | _PROMPTS)

COMMANDS: Mapping[str, Command] = {
    "benchmark": Command(benchmark.add_arguments, benchmark.check, groups=_KV | benchmark.GROUPS),
    "cache_prompt": _ANSWERS,
    "chat": _ANSWERS,
    "convert": Command(
        convert.add_arguments,
        convert.check,
        interrupted=convert.interrupted,
        groups=convert.GROUPS,
    ),
    "evaluate": Command(
        evaluate.add_arguments,
        evaluate.check,
        evaluate.REPLACED,
        evaluate.interrupted,
        groups=_KV | evaluate.GROUPS,
    ),
    "fuse": Command(),
    "generate": _ANSWERS,
    "lora": Command(
        lora.add_arguments, lora.check, interrupted=lora.interrupted, groups=lora.GROUPS
    ),
    "perplexity": Command(kv.add_arguments, kv.check, groups=_KV),
    "server": Command(
        server.add_arguments,
        server.check,
        interrupted=None,
        environment={"api_key": serving.KEY_VARIABLE},
        groups=_KV | server.GROUPS | serving.GROUPS | _PROMPTS,
    ),
}
