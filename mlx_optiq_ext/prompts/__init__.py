"""Prompt caches on disk, in blocks that prompts with the same beginning share.

A server keeps them behind mlx-lm's cache in memory, so that a prompt is computed once::

    from pathlib import Path

    import mlx.core as mx
    import mlx_lm
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_optiq_ext import prompts

    model, tokenizer = mlx_lm.load("Qwen/Qwen3-0.6B")
    space = prompts.space_of(lambda: make_prompt_cache(model), model="Qwen3-0.6B")
    store = prompts.BlockStore.open(Path("prompts"), limit=20_000_000_000)
    stored = prompts.StoredPrompts(store)

    tokens = tokenizer.encode("A long prompt. " * 200)
    caches, known = stored.find(space, tokens) or (space.make(), 0)
    logits = model(mx.array([tokens[known:]]), cache=caches)
    stored.keep(space, tokens, caches)
    print(f"{known} of {len(tokens)} tokens were on disk")
"""

from .agreement import divides
from .inspection import clear, summary
from .reuse import StoredPrompts
from .segments import divided
from .single import Sequences, prefill
from .space import Space, space_of
from .splitting import has_snapshots
from .store import BlockStore
from .tier import TieredPromptCache
from .writer import Writer

__all__ = [
    "BlockStore",
    "Sequences",
    "Space",
    "StoredPrompts",
    "TieredPromptCache",
    "Writer",
    "clear",
    "divided",
    "divides",
    "has_snapshots",
    "prefill",
    "space_of",
    "summary",
]
