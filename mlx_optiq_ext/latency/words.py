"""Predictions as text and as curves."""

from collections.abc import Mapping, Sequence

from .chips import Chip, known_chips
from .demands import demand
from .efficiency import FITTED, Efficiency
from .layout import Layout
from .plot import plot
from .roofline import Prediction, Workload

TYPE_CHECKING = False
if TYPE_CHECKING:  # weights plans for a speed, and kv looks into weights
    from ..kv.plan import KVPlan

#: Contexts of a plot.
CONTEXTS = tuple(2**power for power in range(8, 18))


def summary(prediction: Prediction, chip: Chip, workload: Workload, name: str) -> str:
    """A few lines for the terminal."""
    spent = prediction.seconds
    parts = ", ".join(f"{1e3 * value:.2f} ms {what}" for what, value in spent.items())
    gib = {
        what: f"{size / 2**30:.2f} GiB"
        for what, size in (
            ("all", prediction.peak_bytes),
            ("weights", prediction.weight_bytes),
            ("cache", prediction.cache_bytes),
        )
    }
    batch = f", batch {workload.batch}" if workload.batch > 1 else ""
    missing = chip.measured.failed if chip.measured else ()
    return "\n".join(
        [
            *(f"[optiq] Not measured on {chip.name}: {what}" for what in missing),
            f"[optiq] Predicted for {name} on {chip.name} ({chip.bandwidth_gbs:g} GB/s), "
            f"{workload.prompt} + {workload.generated} tokens{batch}:",
            f"[optiq] prompt_tps={prediction.prefill_tps:.1f}, "
            f"generation_tps={prediction.decode_tps:.1f}, "
            f"peak_memory={prediction.peak_bytes / 1e9:.3f}",
            f"[optiq] A step takes {1e3 * sum(spent.values()):.2f} ms: {parts}",
            f"[optiq] Memory {gib['all']}: {gib['weights']} weights, {gib['cache']} caches, the "
            "rest while the prompt is read",
        ]
    )


def table() -> str:
    """Every chip of the table, one a line."""
    rows = [
        f"{chip.id:14} {chip.name:32} {chip.bandwidth_gbs:7g} GB/s {chip.tflops:7g} TFLOP/s"
        for chip in known_chips().values()
    ]
    sources = dict.fromkeys(chip.source for chip in known_chips().values())
    return "\n".join([*rows, "", *sources])


def curve(
    layout: Layout,
    chip: Chip,
    *,
    batch: int = 1,
    kv_plan: "KVPlan | None" = None,
    contexts: Sequence[int] = CONTEXTS,
    efficiency: Efficiency = FITTED,
) -> list[tuple[float, float]]:
    """Tokens per second at each context length."""
    found = []
    for context in contexts:
        step = demand(layout, context, batch, kv_plan).seconds(chip, efficiency)
        found.append((float(context), batch / sum(step.values())))
    return found


def plotted(layouts: Mapping[str, Layout], chip: Chip, **settings) -> str:
    """An SVG of tokens per second against context, one curve a layout.

    Args:
        layouts: Name -> layout.
        chip: The machine.
        settings: For `curve`.
    """
    return drawn({name: curve(layout, chip, **settings) for name, layout in layouts.items()}, chip)


def drawn(curves: Mapping[str, Sequence[tuple[float, float]]], chip: Chip) -> str:
    """An SVG of finished curves."""
    return plot(curves, f"Predicted decoding on {chip.name}")
