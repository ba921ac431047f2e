"""Throughput of ``mlx_lm.server`` for concurrent clients, with and without a KV plan.

    python tests/benchmarks/serving/clients.py MODEL --problems FILE.jsonl [--clients 16]
        [--requests 64] [--max-tokens 40]
        [--configs "" "--optiq-kv 4" "--kv-bits 4 --quantized-kv-start 0"]
        [--runs 3]

Each configuration gets a server of its own, and they take turns, so that whatever else the machine
does hits all. One warm-up round, then ``--runs`` rounds of new questions, the same for all: the
median of generated tokens per second over all clients, and of the time to the first token; tokens
generated in all, and processor seconds of the server for a thousand of them (Linux).
"""

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

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


def ask(
    client: OpenAI, limit: int, question: str, model: str = "default_model", **fields: Any
) -> tuple[int, float]:
    """Generated tokens, and seconds to the first one; ``fields`` go into the request."""
    began, first, count = time.perf_counter(), 0.0, 0
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=limit,
        stream=True,
        stream_options={"include_usage": True},
        **fields,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content and not first:
            first = time.perf_counter() - began
        if chunk.usage:
            count = chunk.usage.completion_tokens
    return count, first


def processor_seconds(pid: int) -> float:
    """Processor time that a process has used, by Linux' /proc; NaN elsewhere."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.nan
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Served:
    """A server under load, and what was measured of it."""

    process: subprocess.Popen
    client: OpenAI
    rates: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def load(self, questions: list[str], clients: int, limit: int) -> None:
        """Ask all questions, ``clients`` at a time."""
        used, began = processor_seconds(self.process.pid), time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            done = list(pool.map(partial(ask, self.client, limit), questions))
        tokens = sum(count for count, _ in done)
        self.rates.append(tokens / (time.perf_counter() - began))
        self.firsts += [first for _, first in done]
        self.tokens += tokens
        self.seconds += processor_seconds(self.process.pid) - used


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
    lines = args.problems.read_text().splitlines()
    if len(lines) < (args.runs + 1) * args.requests:
        raise SystemExit(f"{args.problems} has {len(lines)} problems, too few for all rounds")
    questions = [json.loads(line)["question"] for line in lines]
    served: dict[str, Served] = {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for config in args.configs:
                process, url = start(args.model, config.split(), Path(scratch) / "log")
                client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
                served[config] = Served(process, client)
            for number in range(args.runs + 1):
                # Other questions each round, so that none finds its answer in the prompt cache.
                asked = questions[number * args.requests :][: args.requests]
                for config, one in served.items():
                    if number == 1:  # what came before was the warm-up
                        served[config] = one = Served(one.process, one.client)
                    one.load(asked, args.clients, args.max_tokens)
        finally:
            for one in served.values():
                one.process.kill()
                one.process.wait()
    print("| options | tokens/s | first token, median | tokens | processor s/1000 tokens |")
    print("|---|---|---|---|---|")
    for config, one in served.items():
        print(
            f"| {config or 'stock'} | {statistics.median(one.rates):.1f} "
            f"| {statistics.median(one.firsts):.2f} s | {one.tokens} "
            f"| {1000 * one.seconds / one.tokens:.1f} |"
        )


if __name__ == "__main__":
    main()
