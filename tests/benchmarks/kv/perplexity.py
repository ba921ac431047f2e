"""Perplexity of KV plans at long context, by stored bits per element.

    python tests/benchmarks/kv/perplexity.py MODEL --text FILE --calibration FILE
        [--budgets 4.5 4.0 3.5] [--specs k4v3r 4 4r 3 3r] [--windows 2] [--tokens 4096]

Each window of ``--tokens`` + 1 tokens of the text goes in chunks of ``--chunk`` into one cache, and
every position counts. A plan is measured and allocated on the calibration text, with K and V of
their own precision or of one together, with rotation and without.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx_lm.utils import dequantize_model

from mlx_optiq_ext.kv import LayerFormat, parse_spec
from mlx_optiq_ext.kv.layout import Mounted, Slot, packed_caches, stock_caches
from mlx_optiq_ext.kv.planning.kv_sensitivity import KVSensitivity
from mlx_optiq_ext.kv.planning.pipeline import plan_kv
from mlx_optiq_ext.kv.planning.plan_search import choose, judged, search


def mean_loss(
    model: nn.Module, windows: np.ndarray, formats: Mapping[Slot, LayerFormat], chunk: int
) -> float:
    """Cross-entropy in nats per token with packed caches; none if ``formats`` is empty."""
    total, count = 0.0, 0
    for window in windows:
        caches = packed_caches(
            stock_caches(model), Mounted(formats, {}, dense=True, mergeable=False)
        )
        for start in range(0, len(window) - 1, chunk):
            tokens = mx.array(window[start : start + chunk + 1])
            logits = model(tokens[None, :-1], cache=caches)[0].astype(mx.float32)
            total += float(nn.losses.cross_entropy(logits, tokens[1:]).sum())
            count += len(tokens) - 1
    return total / count


def plans(found: KVSensitivity, budgets: list[float], specs: list[str]):
    """(name, formats by slot, bits per element, held-out KL) of every plan in the table."""
    for text in specs:
        spec = parse_spec(text)
        if spec is None or spec.everywhere is None:
            raise SystemExit(f"{text} is not a width such as 4, 4r or k4v3r")
        sides = {"k": spec.everywhere.keys, "v": spec.everywhere.values}
        choice = {
            (layer, which): format.fitted(found.shapes[layer, which][0][3])
            for layer, which in found.kl
            if (format := sides[which]) is not None
        }
        yield f"uniform {text}", choice
    for budget in budgets:
        best = search(found, budget)
        yield f"{budget:g}: {best.name}", dict(best.choice)
        yield f"{budget:g} not rotated", choose(found, budget, allow=lambda f: not f.rotated)
        yield f"{budget:g} K and V alike", choose(found, budget, alike=True)


def main() -> None:
    """Print one line a plan."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--budgets", type=float, nargs="*", default=[4.5, 4.0, 3.5])
    parser.add_argument("--specs", nargs="*", default=["8", "4", "4r", "k4rv3r", "3", "3r"])
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=1024)
    args = parser.parse_args()
    best, found = plan_kv(args.model, min(args.budgets), calibration=args.calibration)
    print(best.summary())
    model, tokenizer = mlx_lm.load(args.model)[:2]
    model.set_dtype(mx.float32)
    model = dequantize_model(model)
    tokens = tokenizer.encode(args.text.read_text())[: args.windows * (args.tokens + 1)]
    windows = np.array(tokens, np.int32).reshape(args.windows, -1)
    reference = mean_loss(model, windows, {}, args.chunk)
    print(f"16 bit: {reference:.5f} nats per token, over {windows.size} tokens; loss beside it:")
    print("| plan | bits per element | loss | perplexity | held-out KL |\n|---|---|---|---|---|")
    for name, choice in plans(found, args.budgets, args.specs):
        loss = mean_loss(model, windows, found.formats(choice), args.chunk)
        shares = 100 * (loss / reference - 1), 100 * math.expm1(loss - reference)
        print(
            f"| {name} | {found.bits_per_element(choice):.3f} | {shares[0]:+.3f} % "
            f"| {shares[1]:+.3f} % | {judged(found, choice):.5f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
