"""What one step of a model asks of a chip: bytes, arithmetic and kernel launches."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from .caches import formats_of
from .chips import Chip
from .efficiency import FITTED, Efficiency
from .layout import Layout, Operator
from .measured import Measured

TYPE_CHECKING = False
if TYPE_CHECKING:  # weights plans for a speed, and kv looks into weights
    from ..kv.plan import KVPlan

#: Share of the peak FLOP/s that a prompt's matrix products reach.
MATMUL = {"apple": 0.76, "nvidia": 0.2}
#: Kernels of an attention layer beside its products and norms: rotary embeddings, cache updates,
#: attention, residual sums, activation.
ATTENTION_LAUNCHES = 9
#: More of them where the KV cache is quantized: quantizing, and products for a fused kernel.
PACKED_LAUNCHES = 4
#: More of them where the scores are capped: attention without the fused kernel.
CAPPED_LAUNCHES = 8
#: Sampling and the end of a step.
STEP_LAUNCHES = 20


class Product(NamedTuple):
    """Operators that ask the same of a chip: bytes to read, FLOP to do, stored bits of a weight."""

    nbytes: float
    flops: float
    bits: float
    quantized: bool
    count: int


@dataclass(frozen=True)
class Demand:
    """What one step asks of a chip: one token of each sequence, or many of a prompt.

    Attributes:
        products: Of the weights.
        cache_bytes: Bytes of caches that are read.
        launches: Kernels that every family has.
        expert_layers: Layers with routed experts.
        recurrent_layers: Layers with a recurrent state.
        dtype: Of the activations.
        prompt: Whether many tokens of a prompt are read at once.
        score_flops: FLOP of a prompt's attention.
        elements: Outputs of the products, which norms and sums go over.
    """

    products: tuple["Product", ...]
    cache_bytes: float
    launches: int
    expert_layers: int
    recurrent_layers: int
    dtype: str
    prompt: bool
    score_flops: float
    elements: float

    @property
    def nbytes(self) -> float:
        """All bytes read."""
        return self.cache_bytes + sum(p.nbytes * p.count for p in self.products)

    def seconds(self, chip: Chip, efficiency: Efficiency = FITTED) -> dict[str, float]:
        """Seconds by what they are spent on.

        Returns:
            ``weights``, ``cache`` and ``launches``; of a measured chip ``activations`` too, and
            ``launches`` is what they take beyond the rest.

        Raises:
            InputError: What the model needs was not measured on this chip.
        """
        launches = (
            self.launches
            + self.expert_layers * efficiency.expert_launches
            + self.recurrent_layers * efficiency.recurrent(chip)
        )
        if chip.measured is not None:
            return self._on(chip.measured, launches)
        rate = efficiency.bytes_per_second(chip)
        flops = chip.tflops * 1e12 * MATMUL[chip.family]
        return {
            "weights": sum(p.count * max(p.nbytes / rate, p.flops / flops) for p in self.products),
            "cache": self.cache_bytes / rate,
            "launches": launches * efficiency.seconds_per_launch(chip),
        }

    def _on(self, measured: Measured, launches: float) -> dict[str, float]:
        weights = 0.0
        for product in self.products:
            rates = measured.rates(self.dtype, product.bits, quantized=product.quantized)
            computing = product.flops / rates.tflops * 1e-12
            if self.prompt and product.flops:
                computing += 8 * product.nbytes / product.bits * rates.setup_ps * 1e-12
            weights += product.count * max(product.nbytes / rates.gbs * 1e-9, computing)
        beside = measured.beside(self.dtype)
        cache = self.cache_bytes / (beside.cache_gbs * 1e9)
        if self.prompt:
            cache = self.score_flops / (beside.attention_tflops * 1e12)
        activations = self.elements * beside.element_ns * 1e-9
        alone, behind = (launches * us * 1e-6 for us in (measured.launch_us, measured.gap_us))
        busy = weights + cache + activations
        return {
            "weights": weights,
            "cache": cache,
            "activations": activations,
            "launches": max(behind, alone - busy),
        }


def demand(
    layout: Layout,
    context: float,
    batch: int = 1,
    kv_plan: "KVPlan | None" = None,
    *,
    prompt: int = 0,
) -> Demand:
    """What one step of a model asks of a chip.

    Args:
        layout: The model.
        context: Positions before the token; of a prompt's tokens, half-way through them.
        batch: Sequences at once, which share the weights that are read.
        kv_plan: Precision of keys and values.
        prompt: Tokens of a prompt that are read at once; 0 for a step of generation.
    """
    tokens = batch * (prompt or 1)
    # The head is only run for the last token of a prompt.
    used = [o for o in layout.operators if not (prompt and is_head(o))]
    alike = Counter(
        (
            read_bytes(o, layout, tokens),
            2.0 * used_weights(o, layout) * tokens,
            8 * o.nbytes / max(o.elements, 1),
            o.quantized,
        )
        for o in used
    )
    launches = STEP_LAUNCHES + sum(o.launches for o in used)
    cache_bytes = score_flops = 0.0
    for cache in layout.caches:
        formats = formats_of(kv_plan, cache)
        cache_bytes += batch * cache.nbytes(context, formats, layout.element_bytes)
        if prompt:
            score_flops += 4 * cache.query_width * cache.positions(context) * tokens
        if cache.kind == "recurrent":
            continue
        launches += ATTENTION_LAUNCHES
        launches += CAPPED_LAUNCHES if layout.config.get("attn_logit_softcapping") else 0
        launches += PACKED_LAUNCHES if formats is not None else 0
    return Demand(
        tuple(Product(*kind, count) for kind, count in alike.items()),
        cache_bytes,
        launches,
        layout.expert_layers,
        sum(cache.kind == "recurrent" for cache in layout.caches),
        layout.dtype,
        prompt > 0,
        score_flops,
        float(tokens * sum(_outputs(o, layout) for o in used)),
    )


def read_bytes(operator: Operator, layout: Layout, batch: int = 1) -> float:
    """Bytes of an operator that one decode step reads."""
    if operator.kind == "embedding":
        return batch * operator.nbytes / max(operator.rows, 1)
    if operator.kind == "expert":
        # Distinct experts of independent draws.
        missed = (1 - min(1.0, layout.active_experts / operator.experts)) ** batch
        return operator.nbytes * (1 - missed)
    return operator.nbytes


def used_weights(operator: Operator, layout: Layout) -> float:
    """Weights that one token is multiplied with."""
    if operator.kind == "expert":
        return operator.elements * min(1.0, layout.active_experts / operator.experts)
    return operator.elements if operator.kind == "matmul" else 0.0


def _outputs(operator: Operator, layout: Layout) -> int:
    """Elements that an operator yields for one token."""
    if operator.kind == "expert":
        return operator.rows * min(layout.active_experts, operator.experts)
    return operator.rows if operator.kind == "matmul" else 0


def is_head(operator: Operator) -> bool:
    """Whether an operator is the head, which a prompt's last token alone runs through."""
    name = operator.path.rpartition(".")[2]
    return "layers." not in operator.path and name != "norm" and operator.kind != "vector"
