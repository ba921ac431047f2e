"""Throughput, time to the first token, memory and mounting of many adapters on one base.

    python tests/benchmarks/serving/adapters.py MODEL --problems FILE.jsonl [--adapters 8]
        [--clients 16] [--requests 64] [--max-tokens 40] [--runs 3] [--stock-requests 16]
        [--rank 8] [--mounts 64]

Random adapters of mlx-lm's form are made first. One server then answers the same load on the base,
on one adapter and spread over all, in turns; a stock server, which loads the model anew for another
adapter, answers a shorter alternating load. Medians over ``--runs`` rounds after one to warm up.
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx_lm
from clients import ask, start
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from openai import OpenAI

from mlx_optiq_ext.adapters import mount_adapter_on_model

KEYS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.up_proj"]

#: The end token is biased away: every answer is of the same length, whatever adapter.
SAME_LENGTH = {"logit_bias": {"0": -100}}


def make(model: str, folder: Path, count: int, rank: int) -> list[Path]:
    """Adapters with random weights."""
    loaded = mlx_lm.load(model)[0]
    parameters = {"rank": rank, "scale": 2.0, "dropout": 0.0, "keys": KEYS}
    linear_to_lora_layers(loaded, 999, parameters)
    flat: dict[str, mx.array] = dict(tree_flatten(loaded.parameters()))  # pyright: ignore[reportArgumentType]
    config = {"fine_tune_type": "lora", "num_layers": 999, "lora_parameters": parameters}
    made = []
    for index in range(count):
        mx.random.seed(index)
        tensors = {
            name: mx.random.normal(value.shape) * 0.02
            for name, value in flat.items()
            if name.endswith(("lora_a", "lora_b"))
        }
        made.append(folder / f"n{index}")
        made[-1].mkdir()
        mx.save_safetensors(str(made[-1] / "adapters.safetensors"), tensors)
        (made[-1] / "adapter_config.json").write_text(json.dumps(config))
    return made


def mounting(model: str, adapters: list[Path]) -> str:
    """Seconds and bytes of mounting, the bytes as a share of the files."""
    loaded = mlx_lm.load(model)[0]
    mx.eval(loaded.parameters())
    size = sum((folder / "adapters.safetensors").stat().st_size for folder in adapters)
    mx.clear_cache()
    before, began = mx.get_active_memory(), time.perf_counter()
    for folder in adapters:
        mount_adapter_on_model(loaded, folder.name, folder)
    seconds = time.perf_counter() - began
    taken = (mx.get_active_memory() - before) / size
    return f"{len(adapters)} adapters mounted in {seconds:.2f} s, {taken:.3f} x their files"


def load(url: str, args: argparse.Namespace, questions: list[str], choose) -> tuple[float, float]:
    """Tokens per second over all clients, and the median time to the first token."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    began = time.perf_counter()
    with ThreadPoolExecutor(args.clients) as pool:
        jobs = [
            pool.submit(ask, client, args.max_tokens, question, **SAME_LENGTH, **choose(index))
            for index, question in enumerate(questions)
        ]
        done = [job.result() for job in jobs]
    seconds = time.perf_counter() - began
    return sum(n for n, _ in done) / seconds, statistics.median(first for _, first in done)


def main() -> None:
    """Print a table, and a line about mounting."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--problems", required=True, type=Path)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--stock-requests", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--mounts", type=int, default=64)
    args = parser.parse_args()
    lines = args.problems.read_text().splitlines()[: args.requests]
    questions = [json.loads(line)["question"] for line in lines]
    with tempfile.TemporaryDirectory() as scratch:
        adapters = make(args.model, Path(scratch), max(args.adapters, args.mounts), args.rank)
        print(mounting(args.model, adapters[: args.mounts]), flush=True)
        served = adapters[: args.adapters]
        names = [folder.name for folder in served]
        loads = {
            "base": lambda index: {"model": "default_model"},
            "one adapter": lambda index: {"model": names[0]},
            f"{len(names)} adapters": lambda index: {"model": names[index % len(names)]},
        }
        options = [f"--optiq-adapter={folder.name}={folder}" for folder in served]
        process, url = start(args.model, options, Path(scratch) / "log")
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in loads}
        try:
            for number in range(args.runs + 1):
                # In turns, so that whatever else the machine does hits all; other prompts each
                # time, of the same length, so that none is in the prompt cache.
                for place, (name, choose) in enumerate(loads.items()):
                    asked = [f"{number} {place} {question}" for question in questions]
                    result = load(url, args, asked, choose)
                    if number:
                        found[name].append(result)
        finally:
            process.kill()
            process.wait()
        process, url = start(args.model, [], Path(scratch) / "log")
        try:
            asked = questions[: args.stock_requests]
            found[f"stock, {len(names)} adapters"] = [
                load(
                    url,
                    args,
                    asked,
                    lambda index: {
                        "model": args.model,
                        "extra_body": {"adapters": str(served[index % len(served)])},
                    },
                )
            ]
        finally:
            process.kill()
            process.wait()
    print("| load | tokens/s | first token, median |\n|---|---|---|")
    for name, results in found.items():
        rate, first = (statistics.median(each) for each in zip(*results, strict=True))
        print(f"| {name} | {rate:.1f} | {first:.2f} s |")


if __name__ == "__main__":
    main()
