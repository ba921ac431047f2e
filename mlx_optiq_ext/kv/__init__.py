"""Per-layer precision of the KV cache."""

from .attention import attention
from .cache import PackedKVCache
from .layout import Mounted, make_caches, mount, mounted_on, unmount
from .packed import Format, Packed
from .plan import KVPlan, LayerFormat, parse_spec, read_plan

__all__ = [
    "Format",
    "KVPlan",
    "LayerFormat",
    "Mounted",
    "Packed",
    "PackedKVCache",
    "attention",
    "make_caches",
    "mount",
    "mounted_on",
    "parse_spec",
    "read_plan",
    "unmount",
]
