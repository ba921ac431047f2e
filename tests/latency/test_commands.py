"""``mlx_lm.benchmark --optiq-predict`` and ``mlx_lm.convert --optiq-min-tps``."""

import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from toy_qwen3 import TEXT, write_toy

from mlx_optiq_ext.latency import (
    Chip,
    Layers,
    Measured,
    Products,
    Workload,
    calibration,
    find_chip,
    predict,
    read_layout,
)

TOY_CHIP = {"name": "toy", "bandwidth_gbs": 1, "tflops": 1, "launch_us": 0.01}


@pytest.fixture
def chip(tmp_path):
    path = tmp_path / "toy-chip.json"
    path.write_text(json.dumps(TOY_CHIP))
    return path


def test_a_prediction_loads_no_weights(command, tiny, tmp_path):
    folder = tmp_path / "headers-only"
    folder.mkdir()
    (folder / "config.json").write_text((tiny / "config.json").read_text())
    whole = (tiny / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(whole[:end])
        stream.truncate(len(whole))  # zeros for weights
    done = command("benchmark", "--model", folder, "--optiq-predict", "m4-max-40", "-p", "128")
    assert done.status == 0
    assert "Running warmup" not in done.out
    found = float(re.search(r"generation_tps=([\d.]+)", done.out)[1])  # pyright: ignore
    expected = predict(read_layout(str(tiny)), find_chip("m4-max-40"), Workload(128))
    assert found == pytest.approx(expected.decode_tps, abs=0.06)


def test_a_plan_a_plot_and_the_list(command, tiny, tmp_path):
    svg = tmp_path / "speed.svg"
    options = ("--optiq-predict", "h200", "--optiq-kv", "4", "--optiq-predict-plot", svg)
    done = command("benchmark", "--model", tiny, *options)
    assert done.status == 0, done.err
    assert "KV 4" in svg.read_text()
    listed = command("benchmark", "--optiq-predict", "list")
    assert listed.status == 0
    assert "m1-ultra-64" in listed.out


def test_calibrating_writes_the_chip_that_auto_reads(command, tiny, monkeypatch):
    rates = tuple(Products("bfloat16", bits, bits < 16, 7.0, 1.0) for bits in (4.5, 16))
    layers, failed = (Layers("bfloat16", 7.0, 1.0, 0.1),), ("float16 products: no memory",)
    numbers = Measured(2.0, 1.0, rates, layers, failed)
    measured = Chip("this-machine", "Test", "apple", 7.0, 1.0, launch_us=2.0, measured=numbers)
    monkeypatch.setattr(calibration, "calibrate", lambda: measured)
    done = command(
        "benchmark", "--model", tiny, "--optiq-calibrate-chip", "--optiq-predict", "auto"
    )
    assert done.status == 0, done.err
    assert "Measuring this machine: launches" in done.out
    assert "bfloat16, generation and prompt: 7 GB/s and 1 TFLOP/s at 4.5 bits" in done.out
    assert "Not measured on Test: float16 products: no memory" in done.out
    assert "on Test (7 GB/s)" in done.out
    assert find_chip("auto") == measured


WRONG = [
    (("--optiq-predict", "m4-max"), "did you mean m4-max-32 or m4-max-40"),
    (("--optiq-predict-plot", "x.svg"), "needs --optiq-predict"),
    (("--optiq-predict", "h100", "--optiq-predict-plot", "no/x.svg"), "no folder"),
    (("--optiq-predict", "h100", "--optiq-kv", "7"), "bits 7"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_bad_input_ends_the_command(command, tiny, options, message):
    done = command("benchmark", "--model", tiny, *options)
    assert done.status == 2
    assert message in " ".join(done.err.split())


def test_a_model_without_headers_ends_the_command(command, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = command("benchmark", "--model", tmp_path, "--optiq-predict", "h100")
    assert done.status == 2
    assert "no safetensors weights" in done.err
    assert "Traceback" not in done.err


def test_a_hub_repository_is_asked_for_headers_only(run, tiny):
    weights = (tiny / "model.safetensors").read_bytes()
    files = {"config.json": (tiny / "config.json").read_bytes(), "model.safetensors": weights}
    sent: dict[str, int] = dict.fromkeys(files, 0)

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, *, body):
            name = self.path.partition("?")[0].rpartition("/")[2]
            content = files.get(name)
            if content is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            part = content
            if span:
                part = content[int(span[1]) : int(span[2]) + 1]
            self.send_response(206 if span else 200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("ETag", f'"{name}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if body:
                sent[name] += len(part)
                self.wfile.write(part)

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from mlx_optiq_ext.latency import read_layout\nprint(read_layout('someone/tiny').nbytes)"
    )
    env = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
    }
    try:
        done = run("python", "-c", code, env=env, check=True)
    finally:
        server.shutdown()
    assert int(done.stdout) == read_layout(str(tiny)).nbytes
    assert 0 < sent["model.safetensors"] < len(weights) / 5


def test_a_conversion_for_a_speed_is_predicted_to_reach_it(command, tmp_path, chip):
    toy, out, text = write_toy(tmp_path / "toy", layers=2), tmp_path / "out", tmp_path / "text.txt"
    text.write_text(TEXT * 60)
    whole = predict(read_layout(str(toy)), find_chip(str(chip))).decode_tps
    wanted = whole * 1.05
    done = command(
        *("convert", "--hf-path", toy, "--mlx-path", out, "--optiq-calibration", text),
        *("--optiq-min-tps", f"{wanted}@{chip}"),
    )
    assert done.status == 0, done.err
    reached = predict(read_layout(str(out)), find_chip(str(chip))).decode_tps
    assert wanted <= reached < wanted * 1.2
    assert "tokens per second predicted on toy" in done.out


def test_a_speed_that_every_plan_meets_is_said_to_be(command, tmp_path, chip):
    toy, text = write_toy(tmp_path / "toy", layers=2), tmp_path / "text.txt"
    text.write_text(TEXT * 60)
    done = command(
        *("convert", "--hf-path", toy, "--mlx-path", tmp_path / "out"),
        *("--optiq-calibration", text, "--optiq-min-tps", f"0.001@{chip}"),
    )
    assert done.status == 0, done.err
    assert "which every plan meets: the largest one is taken" in done.out


def test_a_speed_out_of_reach_is_refused_before_anything_is_measured(command, tmp_path, chip):
    toy = write_toy(tmp_path / "toy", layers=2)
    source = ("convert", "--hf-path", toy, "--mlx-path", tmp_path / "out")
    done = command(*source, "--optiq-min-tps", f"1e9@{chip}")
    assert done.status == 2
    assert "out of reach on toy" in done.err
    assert "Measuring" not in done.out
    assert not (tmp_path / "out").exists()
    for options, message in (
        (("--optiq-min-tps", "9@m9"), "no chip 'm9'"),
        (("--optiq-min-tps", "fast"), "tokens per second above 0"),
        (("--optiq-min-tps", "9@h100", "--optiq-budget", "4"), "leave one of them out"),
        (("--optiq-min-tps", "9@h100", "--q-bits", "4"), "--optiq-min-tps and --q-bits"),
    ):
        done = command(*source, *options)
        assert done.status == 2
        assert message in " ".join(done.err.split())
