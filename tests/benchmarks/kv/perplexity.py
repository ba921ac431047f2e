"""What KV plans cost on real text: perplexity, top tokens and KL beside 16 bits.

    python tests/benchmarks/kv/perplexity.py MODEL --text FILE [--specs 8 4 4r 4p 3 3t mlx-lm:4]
        [--budgets 5 4.5 4 3.5 3 --calibration FILE] [--windows 4] [--tokens 2048] [--chunk 2048]
        [--out results/kv_perplexity.jsonl]

Each window of ``--tokens`` + 1 tokens goes in chunks of ``--chunk`` into one cache, as a server
reads a prompt, and every position counts. A spec is what --optiq-kv takes; ``mlx-lm:4`` is mlx-lm's
own --kv-bits 4 from the first token on. A budget is planned on the calibration text as
``mlx_lm.convert --optiq-kv-budget`` does. Errors are standard errors over the tokens.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx_lm.utils import dequantize_model

from mlx_optiq_ext.kv import KVPlan, Mounted, mount, parse_spec, unmount
from mlx_optiq_ext.kv.layout import packed_caches, stock_caches
from mlx_optiq_ext.kv.planning.pipeline import plan_kv

#: Ahead of the bits of mlx-lm's own quantized cache.
STOCK = "mlx-lm:"

Caches = Callable[[], list[Any]]


@dataclass(frozen=True)
class Row:
    """One plan.

    Attributes:
        plan: The spec, or the budget.
        bits: Stored bits per element at the windows' length, scales and biases included.
        perplexity: Share by which it grew, in percent, and its standard error.
        kl: Mean KL from 16 bits in nats per token, and its 99th percentile.
        top: Share of positions whose likeliest token stayed, in percent.
        seconds: Of preparing the plan, and of running the windows.
    """

    plan: str
    bits: float
    perplexity: tuple[float, float]
    kl: tuple[float, float]
    top: float
    seconds: tuple[float, float]


class Windows:
    """Windows of a text, and what the model says of them with 16-bit caches."""

    def __init__(self, model: nn.Module, windows: np.ndarray, chunk: int):
        """Run the model over ``windows`` (n, tokens + 1) with its own caches."""
        self.model, self.windows, self.chunk = model, windows, chunk
        self.references: list[mx.array] = []
        self.losses = self._losses(lambda: stock_caches(model), self._keep)

    def _keep(self, logs: mx.array) -> None:
        self.references.append(logs.astype(mx.float16))
        mx.eval(self.references[-1])

    def row(self, name: str, caches: Caches, bits: float, prepared: float) -> Row:
        """What a plan changes."""
        started, kl, top, number = time.perf_counter(), [], [], iter(range(1 << 30))

        def compare(logs: mx.array) -> None:
            reference = self.references[next(number)].astype(mx.float32)
            kl.append(np.array((mx.exp(reference) * (reference - logs)).sum(axis=-1)))
            top.append(np.array(mx.argmax(reference, axis=-1) == mx.argmax(logs, axis=-1)))

        change = self._losses(caches, compare) - self.losses
        divergence = np.concatenate(kl)
        error = float(change.std() / math.sqrt(len(change)))
        return Row(
            name,
            round(bits, 4),
            (100 * math.expm1(float(change.mean())), 100 * error),
            (float(divergence.mean()), float(np.quantile(divergence, 0.99))),
            100 * float(np.concatenate(top).mean()),
            (prepared, time.perf_counter() - started),
        )

    def _losses(self, caches: Caches, see: Callable[[mx.array], None]) -> np.ndarray:
        """Cross-entropy of each token in nats; ``see`` gets log probabilities of a chunk."""
        losses = []
        for window in self.windows:
            held = caches()
            for start in range(0, len(window) - 1, self.chunk):
                tokens = mx.array(window[start : start + self.chunk + 1])
                logits = self.model(tokens[None, :-1], cache=held)[0].astype(mx.float32)
                logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                losses.append(np.array(-mx.take_along_axis(logs, tokens[1:, None], axis=-1)[:, 0]))
                see(logs)
        return np.concatenate(losses)


def bits_of(mounted: Mounted, held: list[Any], tokens: int) -> float:
    """Stored bits per element of packed caches that hold something; unpacked sides count 16.

    First keys and last tokens that are kept in 16 bits are spread over so many ``tokens``.
    """
    elements = stored = 0.0
    for slot, formats in mounted.formats.items():
        cache = held[slot[0]] if slot[1] is None else held[slot[0]].caches[slot[1]]
        recent = 0 if mounted.dense else formats.recent_tokens
        kept = (recent + formats.sink_tokens, recent)
        for dim, side, count in zip(cache.dims, (formats.keys, formats.values), kept, strict=True):
            size = cache.heads * dim
            elements += size
            extra = 16 * count / tokens
            stored += size * (16 if side is None else side.fitted(dim).bits_per_element + extra)
    return stored / elements


def row(windows: Windows, name: str, plan: KVPlan, prepared: float = 0.0) -> Row:
    """The row of a plan of ours."""
    started = time.perf_counter()
    mounted = mount(windows.model, plan)
    prepared += time.perf_counter() - started
    unmount(windows.model)
    held = packed_caches(stock_caches(windows.model), mounted)
    mx.eval(windows.model(mx.zeros((1, 2), mx.int32), cache=held))
    bits = bits_of(mounted, held, windows.windows.shape[1] - 1)
    return windows.row(
        name, lambda: packed_caches(stock_caches(windows.model), mounted), bits, prepared
    )


def stock_row(windows: Windows, name: str) -> Row:
    """The row of mlx-lm's own quantized cache."""
    from mlx_lm.models.cache import KVCache, QuantizedKVCache

    width = int(name.removeprefix(STOCK))

    def caches() -> list[Any]:
        found = stock_caches(windows.model)
        return [
            QuantizedKVCache(group_size=64, bits=width) if type(c) is KVCache else c for c in found
        ]

    return windows.row(name, caches, width + 0.5, 0.0)


def main() -> None:
    """Print one line a plan."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--budgets", type=float, nargs="*", default=[])
    parser.add_argument("--specs", nargs="*", default=["8", "4", "4r", "4p", "3", "3p"])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.budgets and args.calibration is None:
        parser.error("--budgets plans on a text: give --calibration")
    model, tokenizer = mlx_lm.load(args.model)[:2]
    model.set_dtype(mx.float32)
    model = dequantize_model(model)
    tokens = tokenizer.encode(args.text.read_text())[: args.windows * (args.tokens + 1)]
    given = np.array(tokens, np.int32).reshape(args.windows, -1)
    windows = Windows(model, given, args.chunk)
    machine = {
        "machine": platform.platform(),
        "command": sys.argv,
        **{name: version(name) for name in ("mlx", "mlx-lm")},
    }
    record(args.out, machine)
    print(f"16 bit: perplexity {math.exp(windows.losses.mean()):.4f} over {given.size} tokens")
    print("| plan | bits | perplexity % | KL | KL p99 | same top % | s |")
    print("|---|---|---|---|---|---|---|")
    for name in args.specs:
        if name.startswith(STOCK):
            report(args.out, stock_row(windows, name))
            continue
        plan = parse_spec(name)
        if plan is None:
            parser.error(f"{name} is not a width such as 4, 4r or k4v3r")
        report(args.out, row(windows, name, plan))
    for budget in args.budgets:
        started = time.perf_counter()
        found, _ = plan_kv(args.model, budget, calibration=args.calibration)
        print(found.summary())
        plan = KVPlan(f"budget {budget:g}", found.layers)
        report(args.out, row(windows, plan.source, plan, time.perf_counter() - started))


def report(out: Path | None, found: Row) -> None:
    """Print a row and keep it."""
    (change, error), (kl, most) = found.perplexity, found.kl
    print(
        f"| {found.plan} | {found.bits:.3f} | {change:+.2f} ± {error:.2f} | {kl:.5f} | {most:.3f} "
        f"| {found.top:.2f} | {found.seconds[0]:.0f} + {found.seconds[1]:.0f} |",
        flush=True,
    )
    record(out, asdict(found))


def record(out: Path | None, entry: dict[str, Any]) -> None:
    """Append a line to the raw file."""
    if out is not None:
        with out.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
