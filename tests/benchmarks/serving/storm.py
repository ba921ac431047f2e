"""Clients and administrators who do to a server of adapters all that they can at once.

    python tests/benchmarks/serving/storm.py MODEL ADAPTERS [--seconds 300] [--out FILE.json]

ADAPTERS is a folder of six adapters that answer every question with their folder's name, and of one
named ``damaged`` that cannot be loaded; what is not there is made. Sixteen clients ask for the
adapters, of which three may be mounted; a tenth of the requests is left in mid-stream. Six
administrators load, replace and unload adapters and feed damaged ones. Four more clients never read
their answers. Prints what was answered, and memory and threads of the server.
"""

import argparse
import contextlib
import http.client
import json
import platform
import random
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.append(str(Path(__file__).parents[2]))
from toy_adapters import QUESTIONS

CHAT, LOAD, UNLOAD = "/v1/chat/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
DAMAGED = "damaged"
#: An answer that does not end by itself: without the tokens that end one.
ENDLESS = {"logit_bias": {"0": -100, "1": -100}, "max_tokens": 2000}


@dataclass
class Report:
    """What a storm came to.

    Attributes:
        statuses: Answers by kind of request and status.
        wrong: Answers that are not what they should be.
        slowest: Seconds of the slowest request.
        samples: Seconds since the start, bytes of resident memory and threads of the server.
    """

    statuses: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0
    samples: list[tuple[float, int, int]] = field(default_factory=list)

    def growth(self) -> float:
        """Resident memory of the last fifth, relative to that of the second fifth."""
        fifth = max(1, len(self.samples) // 5)
        first = statistics.median(rss for _, rss, _ in self.samples[fifth : 2 * fifth])
        return statistics.median(rss for _, rss, _ in self.samples[-fifth:]) / first - 1


@dataclass
class Storm:
    """One storm; each actor is a thread that repeats until the time is over.

    Attributes:
        url: The server.
        names: Adapters that it serves, which answer with their names.
        end: When it ends, by the monotonic clock.
        report: What was seen.
    """

    url: str
    names: tuple[str, ...]
    end: float
    report: Report = field(default_factory=Report)
    lock: Any = field(default_factory=threading.Lock)

    def connect(self, timeout: float = 90) -> http.client.HTTPConnection:
        where = urlsplit(self.url)
        return http.client.HTTPConnection(where.hostname or "", where.port, timeout=timeout)

    def note(self, kind: str, status: object, seconds: float, wrong: str = "") -> None:
        with self.lock:
            name = f"{kind} {status}"
            self.report.statuses[name] = self.report.statuses.get(name, 0) + 1
            self.report.slowest = max(self.report.slowest, seconds)
            if wrong:
                self.report.wrong.append(f"{kind}: {wrong}"[:300])

    def send(self, kind: str, path: str, body: Any, right: Callable[[int, str], bool]) -> int:
        """Send a request and compare its answer; 503 has to say when to try again."""
        began, connection = time.monotonic(), self.connect()
        try:
            content = json.dumps(body)
            connection.request("POST", path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
            again = answer.status == 503 and answer.headers["Retry-After"] is not None
            fine = again or right(answer.status, text)
            status: object = answer.status
        except (OSError, http.client.HTTPException) as error:
            fine, status, text = False, type(error).__name__, str(error)
        finally:
            connection.close()
        wrong = "" if fine else f"{json.dumps(body)[-120:]} {status} {text}"
        self.note(kind, status, time.monotonic() - began, wrong)
        return status if isinstance(status, int) else 0

    def ask(self, draw: random.Random, model: str, answer: str, kind: str = "ask") -> int:
        stream = draw.random() < 0.5
        body = {**question(draw), "model": model, "temperature": 0, "max_tokens": 8}

        def right(status: int, text: str) -> bool:
            return status == 200 and said(text, stream) == answer

        return self.send(kind, CHAT, {**body, "stream": stream}, right)

    def client(self, draw: random.Random) -> None:
        """Ask one adapter, or leave in the middle of its answer."""
        name = draw.choice(self.names)
        if draw.random() >= 0.1:
            self.ask(draw, name, name)
            return
        began, connection = time.monotonic(), self.connect()
        body = json.dumps({**question(draw), **ENDLESS, "model": name, "stream": True})
        try:
            connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            again = answer.status == 503 and answer.headers["Retry-After"] is not None
            answer.read(1)
            fine = again or answer.status == 200
            wrong = "" if fine else str(answer.status)
            self.note("leave", answer.status, time.monotonic() - began, wrong)
        except (OSError, http.client.HTTPException) as error:
            self.note("leave", type(error).__name__, time.monotonic() - began, str(error))
        finally:
            connection.close()

    def silent(self, draw: random.Random) -> None:
        """Ask for a long answer, and never read it."""
        where = urlsplit(self.url)
        content = {**question(draw), **ENDLESS, "model": draw.choice(self.names), "stream": True}
        body = json.dumps(content).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with contextlib.suppress(OSError), socket.socket() as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            wire.connect((where.hostname, where.port))
            wire.sendall(head + body)
            self.note("never read", "sent", 0.0)
            wait = min(10.0, self.end - time.monotonic())
            time.sleep(max(0.0, wait))

    def administrator(self, draw: random.Random, own: str) -> None:
        """Load, replace and unload an adapter of one's own; replace one of all by itself."""
        first, second = draw.sample(self.names, 2)
        body = {"lora_name": own, "lora_path": first}
        if self.send("load", LOAD, body, is_status(200)) == 200:
            self.ask(draw, own, first, "ask own")
            body = {"lora_name": own, "lora_path": second, "load_inplace": True}
            if self.send("replace", LOAD, body, is_status(200)) == 200:
                self.ask(draw, own, second, "ask own")
                broken = {**body, "lora_path": DAMAGED}
                self.send("load damaged", LOAD, broken, is_status(400))
                self.ask(draw, own, second, "ask own")
            self.send("unload", UNLOAD, {"lora_name": own}, is_status(200))
        served = draw.choice(self.names)
        body = {"lora_name": served, "lora_path": served, "load_inplace": True}
        # Two administrators may replace one name at once.
        self.send("replace served", LOAD, body, is_status(200, 409))
        self.send("load damaged", LOAD, {"lora_name": own, "lora_path": DAMAGED}, is_status(400))


def question(draw: random.Random) -> dict[str, Any]:
    """The messages of a request."""
    return {"messages": [{"role": "user", "content": draw.choice(QUESTIONS)}]}


def is_status(*expected: int) -> Callable[[int, str], bool]:
    """Whether an answer has one of these statuses."""
    return lambda status, text: status in expected


def said(text: str, stream: bool) -> str:
    """The text of a chat's answer."""
    if not stream:
        return json.loads(text)["choices"][0]["message"]["content"]
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    parts = [choice for line in lines for choice in json.loads(line)["choices"]]
    return "".join(part["delta"].get("content") or "" for part in parts)


def resources(pid: int) -> tuple[int, int]:
    """Bytes of resident memory and threads of a process, by Linux' /proc; 0 elsewhere."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["Threads"])


def rage(
    url: str, pid: int, names: Iterable[str], seconds: float, *, seed: int = 0, clients: int = 16
) -> Report:
    """Let a storm rage over a server.

    Args:
        url: The server.
        pid: Its process.
        names: Adapters that it serves.
        seconds: How long.
        seed: Of what each actor does.
        clients: Clients that read, beside four that do not and six administrators.
    """
    began = time.monotonic()
    storm = Storm(url, tuple(names), began + seconds)

    def repeat(act: Callable[..., None], number: int, *more: str) -> None:
        draw = random.Random(seed * 1000 + number)
        while time.monotonic() < storm.end:
            act(draw, *more)
            time.sleep(0.01)

    actors: list[tuple[Any, ...]] = [(storm.client, number) for number in range(clients)]
    actors += [(storm.silent, 100 + number) for number in range(4)]
    actors += [(storm.administrator, 200 + number, f"own-{number}") for number in range(6)]
    threads = [threading.Thread(target=repeat, args=actor, daemon=True) for actor in actors]
    for thread in threads:
        thread.start()
    while time.monotonic() < storm.end:
        storm.report.samples.append((round(time.monotonic() - began, 2), *resources(pid)))
        time.sleep(min(1.0, seconds / 20))
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive(), "a request does not end"
    return storm.report


def main() -> None:
    """Print a report."""
    from live_server import serve, write_exact
    from toy_adapters import train

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    root = args.adapters.resolve()
    exact = root.parent / f"{root.name}-model"
    if not exact.exists():
        write_exact(args.model, exact)
    names = ("11", "22", "33", "44", "55", "66")
    for name in names:
        if not (root / name).exists():
            train(exact, root / name, name, steps=60)
    if not (root / DAMAGED).exists():
        (root / DAMAGED).mkdir()
        for each in (root / names[0]).iterdir():
            (root / DAMAGED / each.name).write_bytes(each.read_bytes()[:2000])
    served = [f"--optiq-adapter={name}={root / name}" for name in names]
    options = ("--optiq-max-adapters", 3, "--optiq-client-timeout", 5)
    updates = ("--optiq-allow-adapter-updates", "--optiq-adapter-dir", root)
    log = root.parent / "storm.log"
    with serve(log, "--model", exact, *served, *options, *updates) as server:
        report = rage(server.url, server.process.pid, names, args.seconds)
        time.sleep(10)
        after = resources(server.process.pid)
    found = {
        "command": f"storm.py {args.model} {args.adapters} --seconds {args.seconds:g}",
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "growth": round(report.growth(), 4),
        "threads": [report.samples[0][2], max(each[2] for each in report.samples), after[1]],
        **asdict(report),
    }
    if args.out is not None:
        args.out.write_text(json.dumps(found) + "\n")
    brief = {name: value for name, value in found.items() if name != "samples"}
    print(json.dumps({**brief, "wrong": report.wrong[:10]}, indent=1))


if __name__ == "__main__":
    main()
