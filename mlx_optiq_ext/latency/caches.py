"""The cache of each decoder layer, derived from the config and the tensors' names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.config import layer_count

TYPE_CHECKING = False
if TYPE_CHECKING:  # weights plans for a speed, and kv looks into weights
    from ..kv.plan import KVPlan, LayerFormat

#: Parts of module names that only attention layers have.
_KEYS = (
    "k_proj",
    "qkv_proj",
    "wqkv",
    "Wqkv",
    "query_key_value",
    "c_attn",
    "kv_a_proj",
    "kv_b_proj",
)
#: Parts of module names that only recurrent layers have.
_RECURRENT = ("linear_attn", "A_log", "mamba", "ssm", "time_mix", "conv1d", "short_conv", ".conv.")


@dataclass(frozen=True)
class LayerCache:
    """The cache of one decoder layer.

    Attributes:
        index: The layer.
        kind: ``"full"``, ``"sliding"``, ``"latent"`` (MLA), ``"shared"`` (another layer's keys and
            values) or ``"recurrent"``.
        key_width: Elements kept per position as keys; of a latent cache all of them.
        value_width: Elements kept per position as values.
        window: Size of the sliding window in positions, 0 for none.
        state_bytes: Size of a recurrent state.
        query_width: Query heads times their width, for the arithmetic of attention.
    """

    index: int
    kind: str
    key_width: int = 0
    value_width: int = 0
    window: int = 0
    state_bytes: int = 0
    query_width: int = 0

    def positions(self, context: float) -> float:
        """Positions that are read at a context length."""
        return min(context, self.window) if self.window else context

    def nbytes(self, context: float, formats: "LayerFormat | None", width: int) -> float:
        """Bytes read per token and sequence at a context length.

        Args:
            context: Positions before the token.
            formats: The layer's part of a KV plan; None for unpacked.
            width: Bytes of an unpacked element.
        """
        if self.kind == "recurrent":
            return 2 * self.state_bytes  # read and written
        keys = values = float(width)
        if formats is not None and self.kind != "latent":
            keys = formats.keys.bits_per_element / 8 if formats.keys else keys
            values = formats.values.bits_per_element / 8 if formats.values else values
        return self.positions(context) * (self.key_width * keys + self.value_width * values)


def layer_caches(
    config: Mapping[str, Any], modules: Mapping[int, Mapping[str, int]]
) -> tuple[LayerCache, ...]:
    """The cache of every layer that has one.

    Args:
        config: Config of the text model.
        modules: Layer -> module name within the layer -> output rows.
    """
    count = layer_count(config) or len(modules)
    shared = config.get("num_kv_shared_layers") or 0
    found = []
    for index in sorted(modules):
        cache = _layer(config, index, modules[index])
        if cache is None:
            continue
        if cache.kind in ("full", "sliding") and index >= count - shared > 0:
            cache = LayerCache(
                index, "shared", cache.key_width, cache.value_width, cache.window, 0,
                cache.query_width,
            )  # fmt: skip
        found.append(cache)
    return tuple(found)


def formats_of(plan: "KVPlan | None", cache: LayerCache) -> "LayerFormat | None":
    """A layer's part of a KV plan."""
    if plan is None or cache.kind == "recurrent":
        return None
    return plan.layers.get(cache.index, plan.everywhere)


def _layer(config: Mapping[str, Any], index: int, rows: Mapping[str, int]) -> LayerCache | None:
    names = list(rows)
    if any(part in f".{name}." for name in names for part in _RECURRENT):
        return LayerCache(index, "recurrent", state_bytes=_state_bytes(config))
    if not any(part in name for name in names for part in (*_KEYS, "q_proj")):
        return None
    heads = config.get("num_attention_heads") or 1
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    head = config.get("head_dim") or hidden // heads
    if config.get("kv_lora_rank"):
        latent, rotary = config["kv_lora_rank"], config.get("qk_rope_head_dim", 0)
        return LayerCache(index, "latent", latent + rotary, query_width=heads * (latent + rotary))
    kind = _kind(config, index)
    kv_heads = config.get("num_key_value_heads") or heads
    if kind == "full" and config.get("num_global_key_value_heads"):
        kv_heads = config["num_global_key_value_heads"]
    if kind == "full" and config.get("global_head_dim"):
        head = config["global_head_dim"]
    keys = _rows(rows, "k_proj") or kv_heads * head
    values = _rows(rows, "v_proj") or keys
    window = int(config.get("sliding_window") or 0) if kind == "sliding" else 0
    return LayerCache(index, kind, keys, values, window, 0, heads * head)


def _rows(rows: Mapping[str, int], name: str) -> int:
    return next((n for path, n in rows.items() if path.rpartition(".")[2] == name), 0)


def _kind(config: Mapping[str, Any], index: int) -> str:
    if not config.get("sliding_window"):
        return "full"
    types: Sequence[str] = config.get("layer_types") or ()
    if index < len(types):
        return "sliding" if types[index].startswith(("sliding", "chunked")) else "full"
    pattern = config.get("sliding_window_pattern")
    if isinstance(pattern, int) and pattern > 0 and (index + 1) % pattern:
        return "sliding"
    return "full"


def _state_bytes(config: Mapping[str, Any]) -> int:
    """Float32 state of one recurrent layer; 0 where the config names no width."""
    if config.get("linear_num_value_heads"):
        width = config["linear_key_head_dim"] * config["linear_value_head_dim"]
        return 4 * config["linear_num_value_heads"] * width
    heads, size = config.get("mamba_num_heads"), config.get("ssm_state_size")
    if heads and size:
        return 4 * heads * size * config.get("mamba_head_dim", 64)
    return 0
