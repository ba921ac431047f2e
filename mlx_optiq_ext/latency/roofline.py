"""Predicted speed and memory of a model on a chip.

Each operator takes as long as its bytes at the bandwidth a chip reaches or its arithmetic at the
FLOP/s it reaches, whichever is longer, and each kernel a launch. Source: Williams, Waterman,
Patterson, "Roofline" (2009), with the launch term of `efficiency`. A machine that was measured has
rates of its own for each dtype, for quantized weights, and for attention, and launches kernels
while others run: the slower of the two counts.
"""

from dataclasses import dataclass

from ..errors import InputError
from ..model.config import layer_count
from .caches import LayerCache, formats_of
from .chips import Chip
from .demands import MATMUL, demand, is_head, read_bytes, used_weights
from .efficiency import FITTED, Efficiency
from .layout import Layout

TYPE_CHECKING = False
if TYPE_CHECKING:  # weights plans for a speed, and kv looks into weights
    from ..kv.plan import KVPlan

#: Copies of a layer's activations that are alive at once while a prompt is read.
WORKSPACE = 4


@dataclass(frozen=True)
class Workload:
    """The workload to predict.

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
        weight_bytes: Bytes of the model in memory.
        cache_bytes: Bytes of all caches at the end.
        workspace_bytes: Most bytes of intermediate results.
        seconds: Time of a decode step half-way through, by cause.
    """

    prefill_tps: float
    decode_tps: float
    weight_bytes: float
    cache_bytes: float
    workspace_bytes: float
    seconds: dict[str, float]

    @property
    def peak_bytes(self) -> float:
        """Peak memory in bytes."""
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


def _prefill_tps(layout: Layout, chip: Chip, workload: Workload, efficiency: Efficiency) -> float:
    if chip.measured is not None:
        return _measured_prefill_tps(layout, chip, workload, efficiency)
    rate = efficiency.bytes_per_second(chip)
    flops = chip.tflops * 1e12 * MATMUL[chip.family]
    # The head is only run for the last token of a prompt.
    body = [o for o in layout.operators if not is_head(o)]
    per_token = 2 * sum(used_weights(o, layout) for o in body)
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


def _measured_prefill_tps(
    layout: Layout, chip: Chip, workload: Workload, efficiency: Efficiency
) -> float:
    # As mlx-lm counts it: a step reads the last token, and the next one is queued before the clock
    # stops.
    body = workload.prompt - 1
    total = 2 * sum(demand(layout, body, workload.batch).seconds(chip, efficiency).values())
    for start in range(0, body, workload.step):
        tokens = min(workload.step, body - start)
        step = demand(layout, start + tokens / 2, workload.batch, prompt=tokens)
        total += sum(step.seconds(chip, efficiency).values())
    return workload.batch * workload.prompt / total


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
