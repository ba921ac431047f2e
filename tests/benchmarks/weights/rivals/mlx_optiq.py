"""Convert with mlx-optiq 0.7.7, in an environment that holds it, at the bytes of a uniform packing.

    python mlx_optiq.py MODEL WINDOWS.npz CHECKPOINT.json [--windows N] [--bits 2 3 4 8]
        [--out FOLDER --bytes-of BITS GROUP [--among 3 4 8]]

Needs mlx-lm 0.32.0 (``pip install mlx-optiq==0.7.7 mlx-lm==0.32.0 "transformers<5.13"``): on 0.32.1
and later its converter loses its own plan and writes a plain uniform model.

Every step is its own code: sweep, allocation, conversion. Three things are set from outside. It
sweeps the given tokens, four windows at once as this package does, or ``--windows`` spread over
them; on a CPU it does so in float32, since half precision is emulated there; and since its target
counts neither scales, biases nor the embedding, the target is searched that stores the most bits
within the uniform packing's. ``--bits`` are swept, and the plan chooses ``--among`` them. Without
``--out`` it stops after the sweep.
"""

import argparse
import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import load_model

#: Windows run at once.
BATCH = 4


def sweep(model: Any, windows: np.ndarray, checkpoint: Path, bits: list[int], group: int) -> Any:
    """Its sensitivities, which it keeps in the checkpoint."""
    from optiq.core.sensitivity import analyze_sensitivity_exact  # pyright: ignore

    starts = range(0, len(windows), BATCH)
    samples = [((mx.array(windows[start : start + BATCH]),), {}) for start in starts]
    return analyze_sensitivity_exact(
        model,
        lambda: samples,
        candidate_bits=bits,
        group_size=group,
        n_calibration=len(samples),
        checkpoint_path=str(checkpoint),
    )


def stored_bits(model: nn.Module, predicate: Any) -> int:
    """Bits in the file under a quantization predicate ``(path, module) -> bool or dict``."""
    leaves: Any = dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
    parameters: Any = tree_flatten(model.parameters())
    total = sum(8 * value.nbytes for _, value in parameters)
    for path, module in leaves.items():
        packing = predicate(path, module) if hasattr(module, "to_quantized") else False
        if packing:
            weight = module.weight
            dtype_bits = 8 * weight.dtype.size
            group = weight.size // packing["group_size"] * 2 * dtype_bits
            total += weight.size * (packing["bits"] - dtype_bits) + group
    return total


def allocate(model: nn.Module, found: Any, bits: list[int], group: int, limit: int) -> Any:
    """Its plan with the most stored bits within a limit, over its targets.

    Its floor of two tensors a layer above the least width is lowered where nothing fits with it.
    """
    from optiq.core.optimizer import (  # pyright: ignore
        make_quant_predicate,
        optimize_mixed_precision,
    )

    for floor in (2, 1, 0):
        plans = {}
        for target in np.arange(min(bits), max(bits), 0.01):
            with contextlib.redirect_stdout(io.StringIO()):
                plan = optimize_mixed_precision(
                    found,
                    target_bpw=float(target),
                    candidate_bits=bits,
                    group_size=group,
                    n_floor_per_block=floor,
                )
            size = stored_bits(model, make_quant_predicate(plan))
            if size <= limit:
                plans.setdefault(size, (target, plan))
        if plans:
            target, plan = plans[max(plans)]
            print(f"target {target:.2f}, floor {floor}: {max(plans)} of {limit} bits")
            return plan
    raise SystemExit("mlx-optiq has no plan of so few bytes")


def main() -> None:
    """Sweep unless the checkpoint holds all layers, then convert."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--windows", type=int, help="use only so many")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--among", type=int, nargs="+", help="of the bits; default all")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--bytes-of", type=int, nargs=2, metavar=("BITS", "GROUP"))
    args = parser.parse_args()
    windows = np.load(args.tokens)["measured"]
    if args.windows is not None:
        spread = np.linspace(0, len(windows) - 1, args.windows).round().astype(int)
        windows = windows[np.unique(spread)]
    model, _ = load_model(args.model, lazy=False)
    stored = model.parameters()
    if mx.default_device() == mx.Device(mx.cpu):
        model.update(tree_map(lambda a: a.astype(mx.float32), stored))
    mx.eval(model.parameters())
    timing = args.checkpoint.with_suffix(".timing")
    if not timing.exists():  # of a sweep that was stopped nobody knows what it took
        args.checkpoint.unlink(missing_ok=True)
    started, used = time.perf_counter(), time.process_time()
    found = sweep(model, windows, args.checkpoint, args.bits, args.group_size)
    taken = {"seconds": time.perf_counter() - started, "processor": time.process_time() - used}
    # A sweep that finds all in its checkpoint takes no time; what it took then still counts.
    if not timing.exists():
        timing.write_text(json.dumps(taken))
    if args.out is None:
        return
    model.update(stored)
    uniform = dict(zip(("bits", "group_size"), args.bytes_of, strict=True))
    limit = stored_bits(model, lambda *_: uniform)
    bits = args.among or args.bits
    plan = allocate(model, found, bits, args.group_size, limit)
    from optiq.backends.mlx_backend import convert_llm_to_mlx  # pyright: ignore
    from optiq.core.optimizer import make_quant_predicate  # pyright: ignore

    convert_llm_to_mlx(
        str(args.model),
        str(args.out),
        quant_predicate=make_quant_predicate(plan),
        q_bits=min(bits),
        q_group_size=args.group_size,
    )
    written = json.loads((args.out / "config.json").read_text())["quantization"]
    if not any(isinstance(value, dict) for value in written.values()):
        raise SystemExit("mlx-optiq lost its plan and wrote a uniform model: use mlx-lm 0.32.0")


if __name__ == "__main__":
    main()
