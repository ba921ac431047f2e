"""Ctrl-C in commands with our options, sent at several moments to processes of their own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_fixtures import PLAIN
from toy_qwen3 import TEXT, write_toy

START = """
import os, sys, threading, time
sys.argv = ["mlx_lm.convert", "--optiq-budget", "4"]
from pathlib import Path
from mlx_optiq_ext import files
from mlx_optiq_hooks.engine import interruption

def ready():
    print("ready", flush=True)

def long():
    import mlx.core as mx
    a = b = mx.ones((1024, 1024))
    for _ in range(3000):
        b = (a @ b) / 1024
    ready()
    mx.eval(b)

def deaf():
    ready()
    while True:
        try:
            time.sleep(0.1)
        except KeyboardInterrupt:
            pass

class Last:
    def __del__(self):
        ready()
        time.sleep(0.7)

def destructor():
    Last()
    time.sleep(30)

def pool():
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(2) as workers:
        workers.submit(time.sleep, 30)
        ready()
        time.sleep(30)

def thread():
    threading.Thread(target=time.sleep, args=(30,)).start()
    ready()
    time.sleep(30)

with interruption.handled("convert", lambda: "interrupted", grace=float(sys.stdin.readline())):
    with files.staged(Path("out")) as folder:
        folder.mkdir()
        (folder / "half").write_text("x")
"""


def started(words, cwd: Path, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test runner started in the background has Ctrl-C ignored, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def said(errors: str) -> list[str]:
    """The lines on stderr that are no progress bars."""
    lines = re.split(r"[\n\r]", errors)
    return [line for line in lines if line.strip() and "it/s]" not in line and "s/it]" not in line]


@pytest.mark.parametrize("case", ["long", "deaf", "destructor", "pool", "thread"])
def test_ctrl_c_is_handled_where_python_cannot_or_will_not(tmp_path, case):
    process = started(["-c", f"{START}        {case}()"], tmp_path)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("0.5\n")
    process.stdin.flush()
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=15)
    assert process.returncode == 130
    assert said(errors) == ["mlx_lm.convert: interrupted"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["long", "deaf"])
def test_a_second_ctrl_c_ends_at_once(tmp_path, case):
    process = started(["-c", f"{START}        {case}()"], tmp_path)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("60\n")
    process.stdin.flush()
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=15)
    assert process.returncode == 130
    assert said(errors) == ["mlx_lm.convert: interrupted"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """A model that takes a while."""
    return write_toy(tmp_path_factory.mktemp("models") / "deep", layers=12)


def commands(model: Path, folder: Path) -> dict[str, list[object]]:
    text, data = folder / "text.txt", folder / "data"
    text.write_text(TEXT * 100)
    data.mkdir()
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_text('{"text": "There are 12 apples."}\n' * 8)
    source = ("--model", model)
    adapters = ("--adapter-path", folder / "adapters", "--iters", 10000, "--batch-size", 2)
    return {
        "convert": [
            "--hf-path",
            model,
            "--mlx-path",
            folder / "out",
            *PLAIN,
            "--optiq-budget",
            3.5,
            "--optiq-calibration",
            text,
            "--optiq-sensitivity",
            "kl",
        ],
        "evaluate": [
            *source,
            "--optiq-task",
            "kl",
            "--optiq-baseline",
            model,
            "--optiq-data",
            text,
            "--optiq-context",
            16,
        ],
        "lora": [
            *source,
            "--train",
            "--data",
            data,
            "--optiq-rank-scaling",
            "constant",
            *adapters,
            "--num-layers",
            2,
            "--steps-per-report",
            1,
            "--save-every",
            2,
        ],
        "generate": [
            *source,
            "--optiq-kv",
            4,
            "--prompt",
            "apples",
            "--max-tokens",
            10000,
            "--ignore-chat-template",
        ],
    }


def begun(folder: Path) -> bool:
    """Whether something was kept."""
    return (
        any(path.is_file() for path in (folder / "cache").rglob("*"))
        or (folder / "adapters" / "adapters.safetensors").exists()
    )


GOES_ON = {
    "convert": "; the same command goes on from here",
    "evaluate": "; the same command goes on from here",
    "lora": ": --resume-adapter-file {}/adapters/adapters.safetensors goes on from the last "
    "checkpoint",  # or the numbered copy that is written first
    "generate": "",
}


@pytest.mark.parametrize("name", GOES_ON)
@pytest.mark.parametrize("moment", ["loading", "running"])
def test_ctrl_c_says_one_line_and_leaves_nothing_half_written(tmp_path, deep, name, moment):
    words = ["-m", "mlx_lm", name, *commands(deep, tmp_path)[name]]
    cache = {"MLX_OPTIQ_EXT_CACHE": str(tmp_path / "cache")}
    process = started(words, tmp_path, env={**os.environ, **cache})
    if moment == "loading":
        time.sleep(0.5)
    else:
        deadline = time.monotonic() + 100
        assert process.stdout is not None
        if name == "generate":
            # MLX asks for a compiler by system(), which drops Ctrl-C, before it prints much.
            assert process.stdout.read(60).startswith("=====")
        while name != "generate" and not begun(tmp_path):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)  # a file is there a moment before it counts as kept
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    last = said(errors)[-1]
    if moment == "loading":
        assert last == "mlx_lm: interrupted: nothing was done yet"
    else:
        unnumbered = re.sub(r"/\d{7}_adapters", "/adapters", last)
        assert unnumbered == f"mlx_lm.{name}: interrupted{GOES_ON[name].format(tmp_path)}"
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.rglob(".*")) == []
