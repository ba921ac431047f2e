"""Peak memory of a long prompt's prefill, and bytes of the cache after it.

    python tests/benchmarks/kv/memory.py [--tokens 8192] [--layers 8] [--specs 4 8]

A random model whose keys and values outweigh everything else (32 query heads, 8 heads of 128, a
narrow feed-forward), in bfloat16 on a GPU and float32 on a CPU; each configuration in a process of
its own. ``stock 4`` is mlx-lm's own --kv-bits.
"""

import argparse
import json
import subprocess
import sys

import mlx.core as mx
from decoding import random_qwen3

STOCK = {"16 bit": None, "stock 4": 4}


def prefill(name: str, tokens: int, layers: int) -> dict[str, float]:
    """Run one prefill here; megabytes."""
    import importlib

    from mlx_lm.models import cache

    from mlx_optiq_ext import kv

    generating = importlib.import_module("mlx_lm.generate")
    cpu = mx.default_device() == mx.Device(mx.cpu)
    model = random_qwen3(
        mx.float32 if cpu else mx.bfloat16,
        hidden_size=256,
        num_hidden_layers=layers,
        intermediate_size=256,
        vocab_size=1024,
        max_position_embeddings=tokens,
        rope_theta=1e6,
    )
    mx.eval(model.parameters())
    options = {}
    if name in STOCK:
        caches = cache.make_prompt_cache(model)
        if STOCK[name]:
            options = {"kv_bits": STOCK[name], "kv_group_size": 64, "quantized_kv_start": 0}
    else:
        plan = kv.parse_spec(name)
        assert plan is not None
        kv.mount(model, plan)
        caches = kv.make_caches(model)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    prompt = mx.random.randint(0, 1024, (tokens,))
    for _ in generating.generate_step(prompt, model, max_tokens=1, prompt_cache=caches, **options):
        pass
    peak = mx.get_peak_memory() - before
    return {"peak": peak / 2**20, "cache": sum(c.nbytes for c in caches) / 2**20}


def main() -> None:
    """Print one line a configuration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--specs", nargs="*", default=["8", "4"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(prefill(args.one, args.tokens, args.layers)))
        return
    print("| cache | peak, MiB | cache, MiB |\n|---|---|---|")
    for name in [*STOCK, *args.specs]:
        sizes = ["--tokens", str(args.tokens), "--layers", str(args.layers)]
        command = [sys.executable, __file__, "--one", name, *sizes]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"| {name} | {found['peak']:.0f} | {found['cache']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
