"""Tokens per second of decoding under KV plans beside 16 bit: the plans take turns in one process.

    python tests/benchmarks/kv/decoding.py [--lengths 4096 16384 65536] [--batch 8]
        [--plans 16 8 4 mixed] [--repeats 5] [--prefills 2] [--text FILE --tokenizer FOLDER]
        [--layers 36] [--tiny] [--out results/kv_decoding_h200.jsonl]

A random model in 4 bits with the shapes of Qwen3-4B (36 layers, 32 query heads, 8 heads of 128). A
prompt of real text is read under each plan, up to each length in turn; there every repetition
decodes under all plans, one behind the other. ``--batch`` rows continue the longest prompt at once.
``mixed`` has 8 bits in every third layer and 4 in the others, keys as they are. ``build`` and
``launch`` are the milliseconds that the host takes to build a step's graph and to hand it to the
device. Each number is a median with its minimum and maximum; `host_time.py` needs no device.

Without ``--tokenizer`` a token is a word of the text, numbered in the order of appearance.
"""

import argparse
import copy
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

TESTS = Path(__file__).parents[2]
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


def model_of(layers: int, *, tiny: bool = False) -> Any:
    """A random model, 4 bits at group size 64."""
    model = random_qwen3(
        mx.bfloat16,
        hidden_size=64 if tiny else 2560,
        num_hidden_layers=layers,
        intermediate_size=64 if tiny else 9728,
        vocab_size=256 if tiny else 151936,
        max_position_embeddings=262144,
        rope_theta=5e6,
    )
    nn.quantize(model, group_size=64, bits=4)
    mx.eval(model.parameters())
    return model


def formats_of(plan: str, layers: int) -> list[Any]:
    """Each layer's formats under a plan's name; none for 16 bit."""
    from mlx_optiq_ext import kv

    if plan == "16":
        return []
    if plan == "mixed":
        sides = [kv.formats.Affine(8 if i % 3 == 0 else 4, 64) for i in range(layers)]
        return [kv.LayerFormat(side, side) for side in sides]
    parsed = kv.parse_spec(plan)
    assert parsed is not None, f"{plan} is no plan"
    return [parsed.everywhere] * layers


def prompt(text: str, count: int, tokenizer: str | None, vocabulary: int) -> mx.array:
    """``count`` tokens of a text, which is repeated where it is too short: int32 (1, count)."""
    if tokenizer is None:
        numbers: dict[str, int] = {}
        words = re.findall(r"\w+|[^\w\s]", text)
        tokens = [numbers.setdefault(word, len(numbers)) for word in words]
    else:
        from mlx_lm.utils import load_tokenizer

        tokens = load_tokenizer(Path(tokenizer)).encode(text)
    tokens = [token % vocabulary for token in tokens]
    return mx.array([(tokens * (count // len(tokens) + 1))[:count]], mx.int32)


def read(model: Any, caches: list[Any], tokens: mx.array) -> float:
    """Seconds to read a part of a prompt."""
    start = time.perf_counter()
    for begin in range(0, tokens.shape[1], CHUNK):
        model(tokens[:, begin : begin + CHUNK], cache=caches)
        mx.eval([cache.state for cache in caches])
    return time.perf_counter() - start


def decode(model: Any, caches: list[Any], rows: int) -> dict[str, float]:
    """Milliseconds a step and of the host, the next step built while one runs as in generation.

    The caches are left as they were.
    """
    marks, built, launched = [], [], []

    def step(tokens: mx.array) -> mx.array:
        start = time.perf_counter()
        tokens = model(tokens, cache=caches)[:, -1:].argmax(axis=-1)
        middle = time.perf_counter()
        mx.async_eval(tokens)
        built.append(middle - start)
        launched.append(time.perf_counter() - middle)
        return tokens

    tokens = step(mx.zeros((rows, 1), dtype=mx.int32))
    for _ in range(WARM + TIMED):
        following = step(tokens)
        mx.eval(tokens)
        marks.append(time.perf_counter())
        tokens = following
    mx.eval(tokens)
    for cache in caches:
        cache.trim(WARM + TIMED + 1)
    took = [b - a for a, b in zip(marks[WARM:], marks[WARM + 1 :], strict=False)]
    numbers = {"step": took, "build": built[WARM:], "launch": launched[WARM:]}
    return {name: 1e3 * statistics.median(found) for name, found in numbers.items()}


def repeated(caches: list[Any], rows: int) -> list[Any]:
    """Caches with a row's keys and values ``rows`` times."""
    found = [copy.copy(cache) for cache in caches]
    for cache in found:
        if hasattr(cache, "planes"):
            cache.planes = [copy.copy(plane) for plane in cache.planes]
            if cache.residuals is not None:
                cache.residuals = mx.repeat(cache.residuals, rows, axis=0)
        for plane in getattr(cache, "planes", [cache]):
            plane.keys, plane.values = (
                mx.repeat(array, rows, axis=0) for array in (plane.keys, plane.values)
            )
            mx.eval(plane.keys, plane.values)
    return found


def turns(plans: Sequence[str], repeats: int):
    """Each plan once a repetition; each repetition begins with another."""
    for repeat in range(repeats):
        first = repeat % len(plans)
        yield from (*plans[first:], *plans[:first])


class Table:
    """Prints rows of plans, and keeps the raw numbers."""

    def __init__(self, columns: Sequence[str], out: str | None):
        self.out = out
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)

    def add(
        self, batch: int, tokens: int, rows: list[tuple[str, dict[str, Any]]], took: dict[str, Any]
    ) -> None:
        """A row a plan, compared with the first one's; ``took`` holds the prompts' seconds."""
        base = statistics.median(rows[0][1]["step"])
        for plan, numbers in rows:
            rates = [1e3 * batch / each for each in numbers["step"]]
            ratio = base / statistics.median(numbers["step"])
            seconds = took.get(plan, {}).get(tokens, [])
            cells = (batch, tokens, plan, rates, ratio, numbers["build"], numbers["launch"])
            cells += (seconds, numbers["cache"], numbers["peak"])
            print(f"| {' | '.join(map(cell, cells))} |", flush=True)
            if self.out:
                row = {"batch": batch, "tokens": tokens, "plan": plan, "tokens/s": rates}
                row |= {"prompt": seconds, **numbers, "command": sys.argv, "machine": machine()}
                with Path(self.out).open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")


def machine() -> str:
    """Where this runs."""
    device = mx.device_info() if hasattr(mx, "device_info") else {}
    return f"{device.get('device_name', platform.machine())}, MLX {version('mlx')}"


def cell(value: Any) -> str:
    """A number, or of several the median with minimum and maximum."""
    if not isinstance(value, list):
        return f"{value:.2f}" if isinstance(value, float) else str(value)
    if not value:
        return ""
    around = f" ({min(value):.4g} to {max(value):.4g})" if len(value) > 1 else ""
    return f"{statistics.median(value):.4g}{around}"


def maker(model: Any, plan: str, layers: int) -> Callable[[], list[Any]]:
    """Makes empty caches under a plan; what has to be fitted to the model is fitted once."""
    from mlx_optiq_ext import kv
    from mlx_optiq_ext.kv.layout import packed_caches, stock_caches

    formats = formats_of(plan, layers)
    if not formats:
        return lambda: stock_caches(model)
    mounted = kv.mount(model, kv.KVPlan(plan, dict(enumerate(formats))))
    return lambda: packed_caches(stock_caches(model), mounted)


def decoded(
    args: argparse.Namespace, model: Any, caches: dict[str, list[Any]], batch: int
) -> list[tuple[str, dict[str, Any]]]:
    """Each plan's numbers behind the prompt that its caches hold, in turns."""
    found: dict[str, dict[str, Any]] = {p: {"step": [], "build": [], "launch": []} for p in caches}
    for plan in turns(list(caches), args.repeats):
        others = sum(bytes_of(each) for name, each in caches.items() if name != plan)
        own = caches[plan] if batch == 1 else repeated(caches[plan], batch)
        mx.reset_peak_memory()
        numbers = decode(model, own, batch)
        for name, value in numbers.items():
            found[plan][name].append(value)
        found[plan]["cache"] = bytes_of(own) / 2**30
        found[plan]["peak"] = (mx.get_peak_memory() - others) / 2**30
        del own
        if batch > 1:
            mx.clear_cache()
    return list(found.items())


def bytes_of(caches: list[Any]) -> int:
    """Bytes that caches take."""
    return sum(cache.nbytes for cache in caches)


def measure(args: argparse.Namespace) -> None:
    """Read the prompt under each plan, and decode behind each length and in a batch."""
    columns = ("batch", "tokens", "plan", "tokens/s", "x 16 bit", "build, ms", "launch, ms")
    table = Table((*columns, "prompt, s", "cache, GiB", "peak, GiB"), args.out)
    model, lengths = model_of(args.layers, tiny=args.tiny), sorted(args.lengths)
    text = args.text.read_text(encoding="utf-8")
    tokens = prompt(text, lengths[-1], args.tokenizer, model.args.vocab_size)
    makers = {plan: maker(model, plan, args.layers) for plan in args.plans}
    for make in makers.values():  # compiles the kernels of prompts and of decoding
        caches = make()
        read(model, caches, tokens[:, :CHUNK])
        decode(model, caches, 1)
    took: dict[str, dict[int, list[float]]] = {plan: {0: []} for plan in args.plans}
    for left in reversed(range(args.prefills)):
        held = {plan: make() for plan, make in makers.items()}
        for start, length in zip([0, *lengths], lengths, strict=False):
            for plan in args.plans:
                seconds = read(model, held[plan], tokens[:, start:length])
                seconds += took[plan][start][-1] if start else 0.0
                took[plan].setdefault(length, []).append(seconds)
            if left == 0:
                table.add(1, length, decoded(args, model, held, 1), took)
    if args.batch > 1:
        table.add(args.batch, lengths[-1], decoded(args, model, held, args.batch), {})


def main() -> None:
    """Print one row a plan."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 16384, 65536])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--plans", nargs="*", default=["16", "8", "4", "mixed"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prefills", type=int, default=2, help="how often the prompt is read")
    parser.add_argument("--text", type=Path, default=TESTS.parent / "README.md")
    parser.add_argument("--tokenizer", help="folder of a tokenizer")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--tiny", action="store_true", help="small matrices, to try this on a CPU")
    parser.add_argument("--out", help="file that rows are appended to, as JSON lines")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
