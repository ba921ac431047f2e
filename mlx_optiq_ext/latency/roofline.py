"""Predicted speed and memory of a model on a chip.

Each operator takes as long as its bytes at the bandwidth a chip reaches or its arithmetic at the
FLOP/s it reaches, whichever is longer, and each kernel a launch, which some machines hide behind
other kernels' work. Source: Williams, Waterman, Patterson, "Roofline" (2009), with the launch term
of `efficiency`.
"""

import functools
from collections import Counter
from dataclasses import dataclass

from ..errors import InputError
from ..model.config import layer_count
from .caches import LayerCache, formats_of
from .chips import Chip
from .efficiency import FITTED, Efficiency
from .layout import Layout, Operator

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
#: Copies of a layer's activations that are alive at once while a prompt is read.
WORKSPACE = 4


@dataclass(frozen=True)
class Workload:
    """What is asked of the model.

    Attributes:
        prompt: Tokens of the prompt.
        generated: Tokens after it.
        batch: Sequences at once.
        step: Prompt tokens read at once, as ``--prefill-step-size``.
    """

    prompt: int = 512
    generated: int = 1024
    batch: int = 1
    step: int = 2048

    def __post_init__(self):
        if min(self.prompt, self.generated, self.batch, self.step) < 1:
            raise InputError("prompt, generated tokens, batch and step must be 1 or more")


@dataclass(frozen=True)
class Prediction:
    """Predicted figures of a workload.

    Attributes:
        prefill_tps: Prompt tokens per second, of all sequences together.
        decode_tps: Generated tokens per second, of all sequences together, on average.
        weight_bytes: Of the model in memory.
        cache_bytes: Of all caches at the end.
        workspace_bytes: Of what is computed beside them, at most.
        seconds: One decode step half-way, by what it is spent on.
    """

    prefill_tps: float
    decode_tps: float
    weight_bytes: float
    cache_bytes: float
    workspace_bytes: float
    seconds: dict[str, float]

    @property
    def peak_bytes(self) -> float:
        """Memory at the highest."""
        return self.weight_bytes + self.cache_bytes + self.workspace_bytes


def predict(
    layout: Layout,
    chip: Chip,
    workload: Workload | None = None,
    *,
    kv_plan: "KVPlan | None" = None,
    efficiency: Efficiency = FITTED,
) -> Prediction:
    """Predict speed and memory.

    Args:
        layout: The model, from `read_layout`.
        chip: The machine, from `find_chip`.
        workload: Prompt, generation and batch.
        kv_plan: Precision of keys and values; None for unpacked.
        efficiency: Coefficients.

    Raises:
        InputError: The KV plan names a layer that the model does not have.
    """
    workload = workload or Workload()
    if kv_plan is not None and (count := layer_count(layout.config)):
        from ..kv.plan import check_layers

        check_layers(kv_plan, count)
    context = workload.prompt + workload.generated / 2
    seconds = demand(layout, context, workload.batch, kv_plan).seconds(chip, efficiency)
    end = workload.prompt + workload.generated
    return Prediction(
        prefill_tps=_prefill_tps(layout, chip, workload, efficiency),
        decode_tps=workload.batch / sum(seconds.values()),
        weight_bytes=layout.nbytes,
        cache_bytes=workload.batch * sum(_stored(c, end, kv_plan, layout) for c in layout.caches),
        workspace_bytes=_workspace(layout, workload),
        seconds=seconds,
    )


@dataclass(frozen=True)
class Demand:
    """What one decode step asks of a chip.

    Attributes:
        products: Bytes read, FLOP done, stored bits of a weight, and how many operators of the
            model are alike in these.
        cache_bytes: Bytes of caches that are read.
        launches: Kernels that every family has.
        expert_layers: Layers with routed experts.
        recurrent_layers: Layers with a recurrent state.
    """

    products: tuple[tuple[float, float, float, int], ...]
    cache_bytes: float
    launches: int
    expert_layers: int
    recurrent_layers: int

    @property
    def nbytes(self) -> float:
        """All bytes read."""
        return self.cache_bytes + sum(nbytes * count for nbytes, _, _, count in self.products)

    def seconds(self, chip: Chip, efficiency: Efficiency = FITTED) -> dict[str, float]:
        """Seconds for ``weights``, ``cache`` and ``launches`` (what outlasts the others' work)."""
        rate = functools.partial(efficiency.bytes_per_second, chip)
        flops = chip.tflops * 1e12 * MATMUL[chip.family]
        launches = (
            self.launches
            + self.expert_layers * efficiency.expert_launches
            + self.recurrent_layers * efficiency.recurrent(chip)
        )
        found = {
            "weights": sum(
                count * max(nbytes / rate(bits), work / flops)
                for nbytes, work, bits, count in self.products
            ),
            "cache": self.cache_bytes / rate(),
        }
        spent = launches * efficiency.seconds_per_launch(chip)
        hidden = sum(found.values()) if chip.overlapped else 0.0
        return {**found, "launches": max(spent - hidden, 0.0)}


def demand(
    layout: Layout, context: float, batch: int = 1, kv_plan: "KVPlan | None" = None
) -> Demand:
    """What one decode step of a model asks of a chip.

    Args:
        layout: The model.
        context: Positions before the token.
        batch: Sequences at once, which share the weights that are read.
        kv_plan: Precision of keys and values.
    """
    alike = Counter(
        (read_bytes(o, layout, batch), 2.0 * _used(o, layout) * batch, 8 * o.nbytes / o.elements)
        for o in layout.operators
    )
    launches = STEP_LAUNCHES + sum(o.launches for o in layout.operators)
    cache_bytes = 0.0
    for cache in layout.caches:
        formats = formats_of(kv_plan, cache)
        cache_bytes += batch * cache.nbytes(context, formats, layout.element_bytes)
        if cache.kind == "recurrent":
            continue
        launches += ATTENTION_LAUNCHES
        launches += CAPPED_LAUNCHES if layout.config.get("attn_logit_softcapping") else 0
        launches += PACKED_LAUNCHES if formats is not None else 0
    return Demand(
        tuple((*kind, count) for kind, count in alike.items()),
        cache_bytes,
        launches,
        layout.expert_layers,
        sum(cache.kind == "recurrent" for cache in layout.caches),
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


def _used(operator: Operator, layout: Layout) -> float:
    """Weights that one token is multiplied with."""
    if operator.kind == "expert":
        return operator.elements * min(1.0, layout.active_experts / operator.experts)
    return operator.elements if operator.kind == "matmul" else 0.0


def _prefill_tps(layout: Layout, chip: Chip, workload: Workload, efficiency: Efficiency) -> float:
    rate = efficiency.bytes_per_second(chip)
    flops = chip.tflops * 1e12 * MATMUL[chip.family]
    # The head is only run for the last token of a prompt.
    body = [o for o in layout.operators if not _is_head(o)]
    per_token = 2 * sum(_used(o, layout) for o in body)
    total = 0.0
    launches = demand(layout, 0).seconds(chip, efficiency)["launches"]
    for start in range(0, workload.prompt, workload.step):
        tokens = min(workload.step, workload.prompt - start)
        seen = start + tokens / 2
        scores = sum(4 * c.query_width * c.positions(seen) for c in layout.caches)
        work = workload.batch * tokens * (per_token + scores) / flops
        read = sum(read_bytes(o, layout, workload.batch * tokens) for o in body) / rate
        total += max(work, read) + launches
    return workload.batch * workload.prompt / total


def _is_head(operator: Operator) -> bool:
    name = operator.path.rpartition(".")[2]
    return "layers." not in operator.path and name != "norm" and operator.kind != "vector"


def _stored(cache: LayerCache, context: int, plan: "KVPlan | None", layout: Layout) -> float:
    if cache.kind == "shared":
        return 0.0
    size = cache.nbytes(context, formats_of(plan, cache), layout.element_bytes)
    return size / 2 if cache.kind == "recurrent" else size


def _workspace(layout: Layout, workload: Workload) -> float:
    tokens = workload.batch * min(workload.step, workload.prompt)
    config = layout.config
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    inner = config.get("intermediate_size") or 4 * hidden
    if layout.expert_layers:
        inner = layout.active_experts * (config.get("moe_intermediate_size") or inner)
    inner = max(inner) if isinstance(inner, list) else inner
    return WORKSPACE * tokens * layout.element_bytes * (3 * inner + 6 * hidden)
