"""Stock servers as tests start them, and the model they serve."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx_lm
from mlx_lm.utils import save_model


def write_exact(source: Path, folder: Path) -> Path:
    """A model in float32, where a row of a batch computes what it would alone."""
    model, _ = mlx_lm.load(str(source))[:2]
    model.set_dtype(mx.float32)
    save_model(folder, model)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder)
    return folder


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen
    log: Path

    def client(self):
        """A real OpenAI client."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def ask(self, question: str, **options) -> str:
        """The greedy answer to a question."""
        done = self.client().chat.completions.create(
            model="default_model",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=40,
            **options,
        )
        return done.choices[0].message.content or ""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def serve(log: Path, *arguments: object, code: str = "from mlx_lm.server import main; main()"):
    """Run ``mlx_lm.server`` until the block ends."""
    port = free_port()
    command = [sys.executable, "-c", code, "--port", str(port), "--log-level", "INFO"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, *map(str, arguments)], stdout=stream, stderr=stream, text=True
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        await_answer(server)
        yield server
    finally:
        process.kill()
        process.wait(10)


def await_answer(server: Server) -> None:
    """Wait until a server takes requests."""
    for _ in range(1200):
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended: {server.log.read_text()[-2000:]}")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{server.url}/health", timeout=1)
            return
        time.sleep(0.1)
    raise RuntimeError(f"the server does not answer: {server.log.read_text()[-2000:]}")


def settled(folder: Path, blocks: int = 2) -> None:
    """Wait until blocks of prompts are written, and no more come."""
    before = 0
    for _ in range(50):
        files = len(list(folder.rglob("*.safetensors")))
        if files == before >= blocks:
            return
        before = files
        time.sleep(0.3)
    raise AssertionError("no blocks were written")
