"""Time to the first token of a long prompt from disk, and what writing prompts costs a server.

    python tests/benchmarks/serving/prompts.py MODEL TEXT [--float32] [--tokens 6000] [--restarts 3]
        [--runs 3] [--clients 4] [--requests 8] [--request-tokens 600] [--max-tokens 32]
        [--options "--optiq-kv 4"] [--out FILE.jsonl]

First a server with an empty folder is asked for a prompt of ``--tokens`` tokens, started anew, and
asked again, ``--restarts`` times with other places of TEXT. Then two servers, with and without a
folder, answer the same prompts in turns, of which no two begin alike: after a round to warm up,
``--runs`` rounds, and the medians of what the folder costs in each, by the clock and in the
server's processor time (Linux). ``--float32`` serves a
copy of the model in float32, which is faster on most CPUs.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_lm
from clients import Served, ask, start
from openai import OpenAI

sys.path.append(str(Path(__file__).parents[2]))


def texts(model: str, text: str, count: int) -> Iterator[str]:
    """Pieces of ``count`` tokens, one behind another."""
    tokenizer = mlx_lm.load(model, lazy=True)[1]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    for begin in range(0, len(tokens) - count + 1, count):
        yield tokenizer.decode(tokens[begin : begin + count])


def connected(url: str) -> OpenAI:
    """A client that waits."""
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)


def written(folder: Path) -> int:
    """Bytes in a folder once no more come."""
    size = -1
    while True:
        now = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        if now == size and now:
            return now
        size = now
        time.sleep(1)


def first_tokens(model: str, options: list[str], prompt: str, scratch: Path) -> dict[str, Any]:
    """Seconds to the first token of a prompt, computed and from disk after a restart."""
    folder, found = scratch / "prompts", {}
    for name in ("computed", "disk"):
        log = scratch / "log"
        cached = ["--optiq-prompt-cache", str(folder), "--log-level", "INFO"]
        process, url = start(model, [*options, *cached], log)
        try:
            ask(connected(url), 2, "Hello.")  # the first request also loads what is loaded late
            found[name] = ask(connected(url), 2, prompt)[1]
            found["bytes"] = written(folder)
        finally:
            process.kill()
            process.wait()
        lines = [line for line in log.read_text().splitlines() if "[optiq] prompt of" in line]
        found[f"{name}_line"] = lines[-1].partition("[optiq] ")[2]
    return {**found, "share": found["disk"] / found["computed"]}


def rates(
    model: str, args: argparse.Namespace, prompts: list[str], scratch: Path
) -> dict[str, Any]:
    """Tokens per second with and without a folder, in turns."""
    sides: dict[str, list[str]] = {
        "without": [],
        "with": ["--optiq-prompt-cache", str(scratch / "prompts")],
    }
    served: dict[str, Served] = {}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    try:
        for name, own in sides.items():
            options = [*args.options.split(), *own]
            process, url = start(model, options, scratch / f"{name}.log")
            served[name] = Served(process, connected(url))
        for number in range(args.runs + 1):
            asked = prompts[number * args.requests :][: args.requests]
            names = list(served) if number % 2 else list(served)[::-1]
            for name in names:
                if number == 1:  # what came before was the warm-up
                    served[name] = Served(served[name].process, served[name].client)
                before = served[name].seconds
                served[name].load(asked, args.clients, args.max_tokens)
                if number:
                    seconds[name].append(served[name].seconds - before)
    finally:
        for one in served.values():
            one.process.kill()
            one.process.wait()
    found: dict[str, Any] = {name: one.rates for name, one in served.items()}
    pairs = zip(found["with"], found["without"], strict=True)
    found["cost"] = 1 - statistics.median(one / other for one, other in pairs)
    pairs = zip(seconds["with"], seconds["without"], strict=True)
    found["processor_cost"] = statistics.median(one / other for one, other in pairs) - 1
    found["processor_seconds"] = seconds
    return found


def main() -> None:
    """Print one JSON object a measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--request-tokens", type=int, default=600)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--options", default="")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    shared = {"command": " ".join(["prompts.py", *sys.argv[1:]]), "machine": machine}

    def tell(kind: str, found: dict[str, Any]) -> None:
        line = json.dumps({"kind": kind, **shared, **found})
        print(line, flush=True)
        if args.out is not None:
            with args.out.open("a") as stream:
                stream.write(line + "\n")

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        model = args.model
        if args.float32:
            from live_server import write_exact

            model = str(write_exact(Path(args.model), scratch / "model"))
        text = args.text.read_text()
        long = list(texts(model, text, args.tokens))
        for number in range(args.restarts):
            with tempfile.TemporaryDirectory(dir=scratch) as own:
                options = args.options.split()
                tell("first token", first_tokens(model, options, long[number], Path(own)))
        short = list(texts(model, text, args.request_tokens))
        tell("throughput", rates(model, args, short, scratch))


if __name__ == "__main__":
    main()
