"""Tokens per second of decoding at long context under KV plans, prefill time and peak memory.

    python tests/benchmarks/kv/decoding.py [--tokens 65536] [--batch 1 8] [--plans 16 8 4 mixed]

A random model in 4 bits with the shapes of Qwen3-4B (36 layers, 32 query heads, 8 heads of 128);
each plan and batch in a process of its own. One row is prefilled, which is timed; a batch decodes
from a cache filled with random keys and values. ``mixed`` gives every third layer 8 bits and the
others 4. --layers makes the model smaller.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn

#: Tokens decoded before the clock starts, and between its readings.
WARM, TIMED = 8, 32
#: Tokens that a prompt is cut into.
CHUNK = 2048


def random_qwen3(dtype: mx.Dtype, **shape: Any) -> Any:
    """A random Qwen3 with 32 query heads and 8 heads of 128, tied embeddings, not evaluated yet.

    Args:
        dtype: Of the weights.
        shape: Arguments of ``ModelArgs`` that say how large the rest is.
    """
    from mlx_lm.models import qwen3

    model = qwen3.Model(
        qwen3.ModelArgs(
            model_type="qwen3",
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            **shape,
        )
    )
    model.set_dtype(dtype)
    return model


def model_of(layers: int):
    """A random model, 4 bits at group size 64."""
    model = random_qwen3(
        mx.bfloat16,
        hidden_size=2560,
        num_hidden_layers=layers,
        intermediate_size=9728,
        vocab_size=151936,
        max_position_embeddings=262144,
        rope_theta=5e6,
    )
    nn.quantize(model, group_size=64, bits=4)
    mx.eval(model.parameters())
    return model


def caches_of(model, plan: str, layers: int):
    """Empty caches under a plan's name."""
    from mlx_lm.models import cache

    from mlx_optiq_ext import kv

    if plan == "16":
        return cache.make_prompt_cache(model)
    if plan == "mixed":
        formats = [kv.formats.Affine(8 if i % 3 == 0 else 4, 64) for i in range(layers)]
        kv.mount(model, kv.KVPlan(plan, {i: kv.LayerFormat(f, f) for i, f in enumerate(formats)}))
    else:
        parsed = kv.parse_spec(plan)
        assert parsed is not None
        kv.mount(model, parsed)
    return kv.make_caches(model)


def fill(caches, tokens: int, batch: int) -> None:
    """Random keys and values, as many as the prompt would have left."""
    for cache in caches:
        for start in range(0, tokens, 8192):
            shape = (batch, 8, min(8192, tokens - start), 128)
            cache.update_and_fetch(*(mx.random.normal(shape).astype(mx.bfloat16) for _ in range(2)))
            mx.eval(cache.state)


def decode(model, caches, batch: int) -> float:
    """Seconds a step, the next one's graph built while one runs as in mlx-lm's generation."""

    def step(tokens: mx.array) -> mx.array:
        tokens = model(tokens, cache=caches)[:, -1:].argmax(axis=-1)
        mx.async_eval(tokens)
        return tokens

    tokens, marks = mx.zeros((batch, 1), dtype=mx.int32), []
    tokens = step(tokens)
    for _ in range(WARM + TIMED):
        following = step(tokens)
        mx.eval(tokens)
        marks.append(time.perf_counter())
        tokens = following
    return statistics.median(b - a for a, b in zip(marks[WARM:], marks[WARM + 1 :], strict=False))


def prefill(model, caches, tokens: int) -> float:
    """Seconds for a prompt of one row."""
    prompt = mx.random.randint(0, 1000, (1, tokens))
    mx.eval(model(prompt[:, :CHUNK], cache=caches))
    for cache in caches:
        cache.trim(CHUNK)
    start = time.perf_counter()
    for begin in range(0, tokens, CHUNK):
        model(prompt[:, begin : begin + CHUNK], cache=caches)
        mx.eval([cache.state for cache in caches])
    return time.perf_counter() - start


def run(plan: str, tokens: int, batch: int, layers: int) -> dict[str, float]:
    """Measure one plan here."""
    model = model_of(layers)
    # Room to grow comes in steps: the measured tokens stay within one.
    tokens -= tokens % 256 + WARM + TIMED + 2
    caches = caches_of(model, plan, layers)
    found = {}
    mx.reset_peak_memory()
    if batch == 1:
        found["prefill"] = prefill(model, caches, tokens)
    else:
        fill(caches, tokens, batch)
    found["peak"] = mx.get_peak_memory() / 2**30
    found["seconds"] = decode(model, caches, batch)
    found["cache"] = sum(cache.nbytes for cache in caches) / 2**30
    return found


def main() -> None:
    """Print one line a plan and batch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--plans", nargs="*", default=["16", "8", "4", "mixed", "4t"])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args.plans[0], args.tokens, args.batch[0], args.layers)))
        return
    print("| batch | plan | tokens/s | x 16 bit | prefill, s | peak, GiB | cache, GiB |")
    print("|---|---|---|---|---|---|---|")
    for batch in args.batch:
        base = 0.0
        for plan in args.plans:
            options = {
                "--plans": plan,
                "--batch": batch,
                "--tokens": args.tokens,
                "--layers": args.layers,
            }
            command = [sys.executable, __file__, "--one"]
            command += [str(word) for pair in options.items() for word in pair]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(
                    f"| {batch} | {plan} | {(done.stderr.strip().splitlines() or ['?'])[-1][:80]} |"
                )
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            rate = batch / found["seconds"]
            base = base or rate
            took = f"{found['prefill']:.2f}" if "prefill" in found else ""
            print(
                f"| {batch} | {plan} | {rate:.1f} | {rate / base:.2f} | {took} | "
                f"{found['peak']:.1f} | {found['cache']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
