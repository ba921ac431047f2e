"""What a training that stops, fails or goes on leaves on disk."""

import json
import signal
import subprocess
import sys
import time

import mlx.core as mx
import pytest

from mlx_optiq_ext.lora import read_adapter

from .conftest import BY_BITS, error_of, load_tensors


def test_training_goes_on_from_a_checkpoint(lora, packed, tmp_path, capsys):
    lora(packed, tmp_path / "a", *BY_BITS, "--save-every", 1)
    first = tmp_path / "a" / "0000001_adapters.safetensors"
    lora(packed, tmp_path / "b", *BY_BITS, "--resume-adapter-file", first, "--learning-rate", 0)
    before, after = (load_tensors(p) for p in (first, tmp_path / "b" / "adapters.safetensors"))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    assert any(tensor.any() for name, tensor in before.items() if name.endswith("lora_b"))
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["resume_adapter_file"] == str(first)
    other = ("--optiq-rank-scaling", "constant", "--resume-adapter-file", first)
    assert "another rank" in error_of(capsys, lora, packed, tmp_path / "c", *other)
    assert not (tmp_path / "c" / "adapters.safetensors").exists()


def test_a_diverging_training_keeps_the_last_good_checkpoint(lora, packed, tmp_path, capsys):
    lora(packed, tmp_path / "a", *BY_BITS, iters=1)
    before = (tmp_path / "a" / "adapters.safetensors").read_bytes()
    wild = (*BY_BITS, "--learning-rate", 1e38)
    assert "diverged" in error_of(capsys, lora, packed, tmp_path / "a", *wild)
    assert (tmp_path / "a" / "adapters.safetensors").read_bytes() == before
    assert read_adapter(tmp_path / "a").layers


def test_a_folder_with_another_adapter_is_left_alone(lora, packed, tmp_path, capsys):
    lora(packed, tmp_path / "a", *BY_BITS, iters=1)
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    other = ("--optiq-rank-scaling", "constant")
    assert "another training" in error_of(capsys, lora, packed, tmp_path / "a", *other)
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_a_write_that_fails_halfway_changes_nothing(lora, packed, tmp_path, monkeypatch):
    lora(packed, tmp_path / "a", *BY_BITS, iters=1)
    before = (tmp_path / "a" / "adapters.safetensors").read_bytes()
    real = mx.save_safetensors

    def broken(file, arrays, *args):
        real(file, arrays, *args)
        with open(file, "r+b") as stream:  # noqa: PTH123 - MLX takes a name
            stream.truncate(1000)
        raise RuntimeError("[write] no space left")

    monkeypatch.setattr(mx, "save_safetensors", broken)
    with pytest.raises(SystemExit):
        lora(packed, tmp_path / "a", *BY_BITS)
    assert (tmp_path / "a" / "adapters.safetensors").read_bytes() == before
    assert not [path for path in (tmp_path / "a").iterdir() if path.name.startswith(".")]


def test_a_killed_training_leaves_its_last_checkpoint_whole(packed, data, tmp_path):
    command = [sys.executable, "-m", "mlx_lm", "lora", "--model", packed, "--train", "--data", data]
    command += ["--adapter-path", tmp_path / "a", "--save-every", "1", "--iters", "500"]
    command += ["--batch-size", "1", "--max-seq-length", "32", "--val-batches", "1"]
    command += ["--num-layers", "-1", "--optiq-no-compile", *BY_BITS]
    process = subprocess.Popen([str(each) for each in command], stdout=subprocess.DEVNULL)
    third = tmp_path / "a" / "0000003_adapters.safetensors"
    try:
        for _ in range(1200):
            if third.exists():
                break
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    adapter = read_adapter(tmp_path / "a")
    assert len(adapter.layers) == 42
    for name in ("adapters.safetensors", "adapter_model.safetensors", third.name):
        assert load_tensors(tmp_path / "a" / name)
