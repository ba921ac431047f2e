"""Throughput of ``mlx_lm.server`` for concurrent clients, with and without a KV plan.

    python tests/benchmarks/serving.py MODEL --problems FILE.jsonl [--clients 16] [--requests 64]
        [--max-tokens 40] [--configs "" "--optiq-kv 4" "--kv-bits 4 --quantized-kv-start 0"]
        [--runs 3]

Each configuration gets a server of its own. One warm-up round, then ``--runs`` rounds: the median
of generated tokens per second over all clients, and of the time to the first token.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from openai import OpenAI


def start(model: str, options: list[str], log: Path) -> tuple[subprocess.Popen, str]:
    """A server that answers, and its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", model, "--port", str(port)]
    with log.open("w") as stream:
        process = subprocess.Popen([*command, *options], stdout=stream, stderr=stream)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1)
            return process, url
        except (urllib.error.URLError, OSError):
            if process.poll() is not None:
                break
            time.sleep(0.1)
    raise SystemExit(f"the server with {options} does not answer:\n{log.read_text()[-2000:]}")


def ask(client: OpenAI, limit: int, question: str) -> tuple[int, float]:
    """Generated tokens, and seconds to the first one."""
    began, first, count = time.perf_counter(), 0.0, 0
    stream = client.chat.completions.create(
        model="default_model",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=limit,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content and not first:
            first = time.perf_counter() - began
        if chunk.usage:
            count = chunk.usage.completion_tokens
    return count, first


def main() -> None:
    """Print one line a configuration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--problems", required=True, type=Path)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--configs", nargs="*", default=["", "--optiq-kv 4", "--kv-bits 4 --quantized-kv-start 0"]
    )
    args = parser.parse_args()
    lines = args.problems.read_text().splitlines()[: args.requests]
    questions = [json.loads(line)["question"] for line in lines]
    print("| options | tokens/s | first token, median |\n|---|---|---|")
    for config in args.configs:
        process, url = start(args.model, config.split(), Path("serving.log"))
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        rates, firsts = [], []
        try:
            for number in range(args.runs + 1):
                began = time.perf_counter()
                # Other prompts each round, so that no round finds its answers in the prompt cache.
                asked = [f"{number} {question}" for question in questions]
                one = partial(ask, client, args.max_tokens)
                with ThreadPoolExecutor(args.clients) as pool:
                    done = list(pool.map(one, asked))
                if number:
                    rates.append(sum(n for n, _ in done) / (time.perf_counter() - began))
                    firsts += [first for _, first in done]
        finally:
            process.kill()
            process.wait()
        print(
            f"| {config or 'stock'} | {statistics.median(rates):.1f} "
            f"| {statistics.median(firsts):.2f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
