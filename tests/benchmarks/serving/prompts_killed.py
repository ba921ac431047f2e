"""Servers with prompts on disk that are killed at random moments, and two that share a folder.

    python tests/benchmarks/serving/prompts_killed.py MODEL [--kills 50] [--longest 4]
        [--seconds 180] [--clients 4] [--size 20MB] [--options "--optiq-kv 4"] [--out FILE.json]

Serves a copy of MODEL in float32. What it answers without a folder is right. Then a server on one
folder, which is too small for all prompts, is asked by many clients and killed with SIGKILL within
``--longest`` seconds, again and again; and two servers on another folder are asked for
``--seconds``. Prints the answers that were read and those that were wrong, the blocks that were
found damaged, and what the folders hold.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))
from live_server import Server, serve, write_exact
from openai import OpenAIError

from mlx_optiq_ext import prompts

QUESTIONS = (" How many?", " Why?", " What is in bag 3?", " Who said so?")
#: Prompts of about 600 tokens.
STORIES = [
    " ".join(f"There are {i + n} bricks in bag {i * (n + 3) % 17}." for i in range(60))
    for n in range(16)
]


@dataclass
class Clients:
    """Clients that compare what they are answered.

    Attributes:
        right: Answer by prompt.
        counts: Answers that were read, that were wrong, and requests that failed.
        wrong: What was wrong.
        reused: Tokens that were not computed.
    """

    right: dict[str, str]
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    reused: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def rush(self, servers: list[Server], seconds: float, clients: int, seed: int) -> None:
        """Ask for a time; the servers may die."""
        end = time.monotonic() + seconds
        threads = [
            threading.Thread(
                target=self._repeat,
                args=(servers[n % len(servers)], end, random.Random(seed * 100 + n)),
                daemon=True,
            )
            for n in range(clients)
        ]
        for thread in threads:
            thread.start()
        time.sleep(max(0.0, end - time.monotonic()))

    def _repeat(self, server: Server, end: float, draw: random.Random) -> None:
        while time.monotonic() < end:
            prompt = draw.choice(list(self.right))
            try:
                answer, reused = ask(server, prompt)
            except OpenAIError:  # the server was killed
                self._count("failed")
                time.sleep(0.1)
                continue
            self._count("read")
            with self.lock:
                self.reused += reused
                if answer != self.right[prompt]:
                    self.counts["wrong"] += 1
                    self.wrong.append(f"{prompt[-20:]}: {answer!r}, not {self.right[prompt]!r}")

    def _count(self, name: str) -> None:
        with self.lock:
            self.counts[name] += 1


def ask(server: Server, prompt: str) -> tuple[str, int]:
    """The greedy answer, and the tokens that were not computed."""
    done = server.client().chat.completions.create(
        model="default_model",
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=12,
    )
    details = done.usage and done.usage.prompt_tokens_details
    return done.choices[0].message.content or "", (details and details.cached_tokens) or 0


def right_answers(command: list[object], scratch: Path) -> dict[str, str]:
    """What a server without a folder answers."""
    with serve(scratch / "plain.log", *command) as server:
        asked = [story + question for story in STORIES for question in QUESTIONS]
        return {prompt: ask(server, prompt)[0] for prompt in asked}


def killed(
    command: list[object], right: dict[str, str], args: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """Kill a loaded server at random moments."""
    folder, draw, clients = scratch / "killed", random.Random(0), Clients(right)
    cached = [*command, "--optiq-prompt-cache", folder, "--optiq-prompt-cache-size", args.size]
    left_out = 0
    for number in range(args.kills):
        log = scratch / "killed.log"
        with serve(log, *cached) as server:  # leaving the block kills it
            clients.rush([server], draw.uniform(0.1, args.longest), args.clients, number)
        left_out += log.read_text().count("is left out")
    parts = len(list(folder.rglob("*.part")))
    return {**_report(clients, [folder]), "left_out": left_out, "unfinished_files": parts}


def sharing(
    command: list[object], right: dict[str, str], args: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """Ask two servers on one folder."""
    folder, clients = scratch / "shared", Clients(right)
    cached = [*command, "--optiq-prompt-cache", folder, "--optiq-prompt-cache-size", args.size]
    logs = [scratch / f"shared{number}.log" for number in range(2)]
    with serve(logs[0], *cached) as one, serve(logs[1], *cached) as other:
        clients.rush([one, other], args.seconds, args.clients, 10_000)
    left_out = sum(log.read_text().count("is left out") for log in logs)
    return {**_report(clients, [folder]), "left_out": left_out}


def _report(clients: Clients, folders: list[Path]) -> dict[str, Any]:
    held = [line for folder in folders for line in prompts.summary(folder)]
    found = {name: clients.counts[name] for name in ("read", "wrong", "failed")}
    return {**found, "reused_tokens": clients.reused, "examples": clients.wrong[:5], "held": held}


def main() -> None:
    """Print a report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--longest", type=float, default=4)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--size", default="20MB")
    parser.add_argument("--options", default="")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        command = ["--model", write_exact(args.model, scratch / "model"), *args.options.split()]
        right = right_answers(command, scratch)
        found = {
            "command": " ".join(["prompts_killed.py", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "prompts": len(right),
            f"{args.kills} kills": killed(command, right, args, scratch),
            f"two servers, {args.seconds:g} s": sharing(command, right, args, scratch),
        }
    text = json.dumps(found, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
