"""Measures this machine with the kernels of decoding and of reading a prompt."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import mlx.core as mx

from ..errors import OptiqError
from . import probes
from .chips import Chip
from .demands import ATTENTION_LAUNCHES, MATMUL, demand
from .layout import Layout
from .measured import DTYPES, Layers, Measured, Products

#: Bits of quantized weights whose rates are measured beside that of unquantized ones.
BITS = (2, 4, 8)
#: Timed runs of a probe, and the seconds after which no further one starts.
REPEATS, SECONDS = 7, 0.4
#: How much longer than launching it products before a layer take, so that they hide it; and how
#: many there are at most.
HIDES = 3
LARGE = 100
#: Runs of a probe whose times make no rate, since others took the processor meanwhile.
TRIES = 3
#: Share of a core below which others have taken too much of it for the times to mean anything.
BUSY = 0.7
#: Two kernels of `probes.between` that no layer has.
EXTRA = 2

#: In words.
MEASURES = (
    "launches; products unquantized and at 2, 4 and 8 bits, attention and norms, each in float32, "
    "bfloat16 and float16. A minute at most, if nothing else runs"
)

Clock = Callable[[], float]
T = TypeVar("T")


class _ProbeError(OptiqError):
    """A probe's times make no rate."""


def calibrate(
    *,
    sizes: probes.Sizes | None = None,
    dtypes: tuple[str, ...] = DTYPES,
    seconds: float = SECONDS,
    clock: Clock = time.perf_counter,
    say: Callable[[str], None] = print,
) -> Chip:
    """Measure MLX's default device: launches, and products, attention and norms by dtype.

    Products are measured with unquantized weights and with those of 2, 4 and 8 bits, with one row
    and with a prompt's; each is the best of a few runs, so that a minute is enough.

    Args:
        sizes: Of the probes; by default those for a GPU or a CPU.
        dtypes: Of activations.
        seconds: After which a probe is not run again.
        clock: Seconds.
        say: Receives a line for each probe that failed, and one if the CPU was busy.

    Returns:
        A chip with ``measured``. What could not be measured is named in it and left out.

    Raises:
        OptiqError: The launches could not be measured, or nothing else could.
    """
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    own = sizes or (probes.CPU if on_cpu else probes.GPU)
    failed: list[str] = []
    started, used = clock(), time.process_time()

    def attempt(what: str, run: Callable[[], T]) -> T | None:
        try:
            for _ in range(TRIES - 1):
                with suppress(_ProbeError):
                    return run()
            return run()
        except (_ProbeError, RuntimeError, ValueError, MemoryError) as error:
            failed.append(f"{what}: {str(error).strip().partition(chr(10))[0]}"[:200])
            say(f"[optiq] Not measured: {failed[-1]}")
            return None
        finally:
            mx.clear_cache()

    timing = _Timing(seconds, clock)
    main = "float32" if on_cpu else "bfloat16"
    launches = attempt("kernel launches", lambda: _launches(own, getattr(mx, main), timing))
    found = [
        attempt(_named(dtype, bits), lambda d=dtype, b=bits: _products(own, d, b, timing))
        for dtype in dtypes
        for bits in (None, *BITS)
    ]
    beside = [
        attempt(f"attention and norms in {dtype}", lambda d=dtype: _layers(own, d, timing))
        for dtype in dtypes
    ]
    share = (time.process_time() - used) / max(clock() - started, 1e-9)
    if on_cpu and share < BUSY:
        say(
            f"[optiq] This machine was busy: the probes had {share:.0%} of a core, and predictions "
            "will be too low. Measure again when nothing else runs"
        )
    products = tuple(each for each in found if each is not None)
    dense = [p for p in products if not p.quantized]
    if launches is None or not dense:
        raise OptiqError(
            "this machine could not be measured (" + "; ".join(failed) + "): name a chip with "
            "--optiq-predict, or describe it in a JSON file"
        )
    best = next((p for p in dense if p.dtype == main), dense[0])
    family = "apple" if on_cpu or mx.metal.is_available() else "nvidia"
    layers = tuple(each for each in beside if each is not None)
    launch, gap = map(_rounded, launches)
    return Chip(
        id="this-machine",
        name=_device_name(),
        family=family,
        bandwidth_gbs=_rounded(best.gbs),
        tflops=_rounded(best.tflops / MATMUL[family]),
        launch_us=launch,
        source="measured by --optiq-calibrate-chip",
        measured=Measured(launch, gap, products, layers, tuple(failed)),
    )


def summary(chip: Chip) -> str:
    """What was measured, a line for each dtype."""
    measured = chip.measured
    assert measured is not None
    lines = [
        f"[optiq] {chip.name}: {measured.launch_us:.2f} us a kernel, {measured.gap_us:.2f} us "
        "where larger ones hide its launch"
    ]
    for dtype in dict.fromkeys(p.dtype for p in measured.products):
        own = [p for p in measured.products if p.dtype == dtype]
        rates = ", ".join(
            f"{p.gbs:.4g} GB/s and {p.tflops:.4g} TFLOP/s "
            + (f"at {p.bits:g} bits" if p.quantized else "unquantized")
            for p in own
        )
        lines.append(f"[optiq] {dtype}, generation and prompt: {rates}")
    return "\n".join(lines)


def _named(dtype: str, bits: int | None) -> str:
    return f"{dtype} products with " + (f"{bits}-bit" if bits else "unquantized") + " weights"


def _device_name() -> str:
    from mlx_optiq_compat import symbols

    if mx.default_device() == mx.Device(mx.cpu):
        return "MLX on a CPU"
    try:
        return str(symbols.device_info().get("device_name", "this machine"))
    except (RuntimeError, TypeError):
        return "this machine"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


class _Timing:
    """Times runs within a limit."""

    def __init__(self, limit: float, clock: Clock):
        self.limit, self.clock = limit, clock

    def best(self, *runs: Callable[[], object]) -> list[float]:
        """Seconds of the best of a few runs of each, taken in turns."""
        for run in runs:
            run()  # compiles its kernels
        times: list[list[float]] = [[] for _ in runs]
        started = self.clock()
        for _ in range(REPEATS):
            for run, own in zip(runs, times, strict=True):
                start = self.clock()
                run()
                own.append(self.clock() - start)
            if self.clock() - started > self.limit:
                break
        return [min(own) for own in times]

    def each(self, probe: probes.Probe, few: int, many: int) -> float:
        """Seconds of one repeat, without what any evaluation takes."""
        short, long = self.best(lambda: mx.eval(probe(few)), lambda: mx.eval(probe(many)))
        if not long > short:
            raise _ProbeError(f"{many} repeats took no longer than {few}")
        return (long - short) / (many - few)


def _products(sizes: probes.Sizes, dtype: str, bits: int | None, timing: _Timing) -> Products:
    kind = getattr(mx, dtype)
    choices = probes.weights(sizes, kind, bits)
    # A pass over all of them, where reading is what takes the time.
    count = len(choices) if bits is None or sizes.packed_rows == sizes.rows else 1
    nbytes = sum(part.nbytes for part in choices[0])
    elements = (sizes.rows if bits is None else sizes.packed_rows) * sizes.columns
    prompt = sizes.prompt if bits is None else sizes.packed_prompt

    def each(rows: int, few: int, many: int) -> float:
        return timing.each(probes.products(choices, rows, sizes.columns, kind, bits), few, many)

    one = each(1, count, 3 * count if count > 1 else 5)
    part, whole = (each(rows, 1, 8 if count > 1 else 3) for rows in (prompt // 4, prompt))
    row = (whole - part) / (prompt - prompt // 4)
    if not row > 0:
        raise _ProbeError(f"{prompt} rows took no longer than {prompt // 4}")
    # Noise may make it negative: then rows are all that takes time.
    setup = max(0.0, part - row * (prompt // 4))
    if not setup:
        row = whole / prompt
    return Products(
        dtype,
        round(8 * nbytes / elements, 4),
        bits is not None,
        _rounded(nbytes / one / 1e9),
        _rounded(2.0 * elements / row / 1e12),
        _rounded(setup / elements * 1e12),
    )


def _layers(sizes: probes.Sizes, dtype: str, timing: _Timing) -> Layers:
    kind = getattr(mx, dtype)
    reads, nbytes = probes.cache_reads(sizes, kind)
    scores, flops = probes.prompt_attention(sizes, kind)
    small, elements = probes.small_kernels(sizes, kind)
    return Layers(
        dtype,
        _rounded(nbytes / timing.each(reads, 4, 12) / 1e9),
        _rounded(flops / timing.each(scores, 1, 4) / 1e12),
        _rounded(timing.each(small, 1, 4) / elements * 1e9),
    )


def _launches(sizes: probes.Sizes, dtype: mx.Dtype, timing: _Timing) -> tuple[float, float]:
    """Microseconds of a kernel where launches are all there is, and where they are hidden."""
    model, layout = probes.small_model(sizes, dtype)
    run = probes.generation(model, sizes.steps)
    short, long = timing.best(probes.generation(model, sizes.steps // 3), run)
    step = (long - short) / (sizes.steps - sizes.steps // 3)
    if not step > 0:
        raise _ProbeError("more tokens took no longer than fewer")
    launch = step / demand(layout, 0).launches

    choices = probes.weights(sizes, dtype, None)
    probe = probes.products(choices, 1, sizes.columns, dtype, None)
    product = timing.each(probe, len(choices), 3 * len(choices))
    kernels = _layer_launches(layout) + EXTRA
    large = min(max(1, round(HIDES * kernels * launch / product)), LARGE)
    mixed = probes.between(model, sizes, dtype, choices, large)
    alone, together = timing.best(lambda: mx.eval(mixed(False)), lambda: mx.eval(mixed(True)))
    gap = (together - alone) / sizes.layers / kernels
    # Noise may make it negative: then it is too small to see.
    return 1e6 * launch, 1e6 * min(max(gap, 0.0), launch)


def _layer_launches(layout: Layout) -> int:
    return ATTENTION_LAUNCHES + sum(o.launches for o in layout.operators if "layers.0." in o.path)
