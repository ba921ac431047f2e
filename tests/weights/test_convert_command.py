"""The stock command with a budget, in processes of its own."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_fixtures import PLAIN
from toy_qwen3 import TEXT, write_toy

from mlx_optiq_ext import files
from mlx_optiq_ext.errors import InputError

LOAD = """
import sys, mlx_lm
from mlx_lm.utils import compute_bits_per_weight
model, tokenizer = mlx_lm.load(sys.argv[1])
assert "mlx_optiq_hooks" not in sys.modules
print(compute_bits_per_weight(model))
"""


FORMS = [
    ("mlx_lm.convert",),
    ("python", "-m", "mlx_lm", "convert"),
    ("python", "-m", "mlx_lm.convert"),
]
# The umbrella script came with mlx-lm 0.30.6.
if Path(sys.executable).with_name("mlx_lm").exists():
    FORMS.append(("mlx_lm", "convert"))


@pytest.mark.parametrize("command", FORMS, ids=" ".join)
def test_every_form_of_the_command_writes_a_model_for_bare_mlx_lm(
    run, toy, text, tmp_path, command
):
    out = tmp_path / "out"
    source = ("--hf-path", toy, "--mlx-path", out, "--optiq-calibration", text)
    done = run(*command, *source, *PLAIN, "--optiq-budget", "3.5", check=True)
    printed = float(re.search(r"with (\S+) bits per weight", done.stdout)[1])  # pyright: ignore
    assert printed <= 3.5
    loaded = run("python", "-c", LOAD, out, env={"MLX_OPTIQ_EXT": "0"}, check=True)
    assert float(loaded.stdout) == pytest.approx(printed, abs=5e-4)
    metadata = json.loads((out / "optiq_metadata.json").read_text())
    assert metadata["target_bpw"] == 3.5
    assert metadata["base_model"] == toy.name
    made = f"mlx_lm.convert --hf-path {toy.name} --optiq-calibration {text.name} "
    assert metadata["command"].startswith(made)
    assert metadata["command"] in (out / "README.md").read_text()
    assert "peak memory" in done.stdout
    assert "stock uniform" in done.stdout
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_conversion_refines_unless_told_otherwise(command, toy, text, tmp_path):
    source = ("--hf-path", toy, "--optiq-calibration", text, "--optiq-budget", "4")
    done = command("convert", *source, "--mlx-path", tmp_path / "out")
    assert done.status == 0, done.err
    steps = json.loads((tmp_path / "out" / "optiq_metadata.json").read_text())["post_processing"]
    assert [step["op"] for step in steps] == ["refine"]
    assert re.search(
        r"\[optiq\] Refining: \S+ s for the first of \d+ layers, about \d+ s", done.out
    )
    done = command("convert", *source, *PLAIN, "--mlx-path", tmp_path / "plain")
    assert done.status == 0, done.err
    assert "Refining" not in done.out
    assert command("convert", *source, "--optiq-effort", "most").status == 2


@pytest.mark.parametrize("option", ["--optiq-budget", "--optiq-kv-budget"])
def test_a_text_of_few_tokens_is_refused_before_anything_is_measured(
    command, toy, tmp_path, option
):
    text = tmp_path / "short.txt"
    text.write_text(TEXT * 10)
    words = ("--hf-path", toy, "--mlx-path", tmp_path / "out", "--optiq-calibration", text)
    done = command("convert", *words, option, 5)
    assert done.status == 2
    assert "the calibration text (short.txt) has 223 tokens, too few" in done.err.splitlines()[-1]
    assert "Measuring" not in done.out + done.err
    assert not (tmp_path / "out").exists()


# A limit on file size is a full disk that needs no root and harms no one else.
FULL_DISK = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
sys.argv = ["mlx_lm", "convert", *sys.argv[1:]]
runpy.run_module("mlx_lm", run_name="__main__")
"""


def test_a_full_disk_leaves_no_folder_behind(run, toy, text, tmp_path):
    out = tmp_path / "deep" / "out"
    source = ("--hf-path", toy, "--mlx-path", out, "--optiq-calibration", text)
    done = run("python", "-c", FULL_DISK, *source, *PLAIN, "--optiq-budget", "4.5")
    assert done.returncode == 2
    assert "free some disk space" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(out.parent.iterdir()) == []


def test_ctrl_c_keeps_what_was_measured(text, tmp_path, monkeypatch):
    # Deep enough that the sweep is still running when the signal arrives.
    model = write_toy(tmp_path / "deep", layers=12)
    cache = tmp_path / "cache"
    monkeypatch.setenv("MLX_OPTIQ_EXT_CACHE", str(cache))
    command = [
        sys.executable,
        "-m",
        "mlx_lm",
        "convert",
        *PLAIN,
        "--optiq-budget",
        "3.5",
    ]
    command += ["--hf-path", str(model), "--mlx-path", str(tmp_path / "out")]
    command += ["--optiq-calibration", str(text), "--optiq-sensitivity", "kl"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A test runner started in the background has Ctrl-C ignored, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (journals := list(cache.rglob("*.jsonl"))):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert not (tmp_path / "out").exists()
    measured = journals[0].read_text()
    assert measured.strip()
    subprocess.run(command, check=True, capture_output=True)
    assert journals[0].read_text().startswith(measured)
    assert list((cache / "sensitivity").rglob("*.jsonl")) == journals


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a" / "out"

    def interrupted():
        with files.staged(target) as folder:
            folder.mkdir()
            (folder / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(target.parent.iterdir()) == []
    with files.staged(target) as folder:
        folder.mkdir()
        (folder / "whole").write_text("x")
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    with pytest.raises(InputError, match="exists already"), files.staged(target):
        pass


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
    path.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        files.read_json(path)
