"""Per-layer precision of the KV cache.

A plan is mounted on a loaded model, whose caches then keep each layer at its own precision::

    import mlx_lm
    from mlx_optiq_ext import kv

    model, tokenizer = mlx_lm.load("Qwen/Qwen3-0.6B")
    kv.mount(model, kv.parse_spec("k8v4"))
    text = mlx_lm.generate(model, tokenizer, "Hello", prompt_cache=kv.make_caches(model))
"""

from ..kernels import Platform
from . import formats
from .attention import attend
from .cache import PackedKVCache
from .layout import Mounted, make_caches, mounted_on
from .mounting import mount, unmount
from .packed_array import Packed
from .plan import KVPlan, LayerFormat, parse_spec, read_plan
from .plan_source import find_plan, plan_digest

__all__ = [
    "KVPlan",
    "LayerFormat",
    "Mounted",
    "Packed",
    "PackedKVCache",
    "Platform",
    "attend",
    "find_plan",
    "formats",
    "make_caches",
    "mount",
    "mounted_on",
    "parse_spec",
    "plan_digest",
    "read_plan",
    "unmount",
]
