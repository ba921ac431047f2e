"""KV plans within a budget, measured on a real small model."""

import json
import shutil
from dataclasses import replace

import mlx_lm
import numpy as np
import pytest

from mlx_optiq_ext.errors import BudgetError, InputError
from mlx_optiq_ext.kv import read_plan
from mlx_optiq_ext.kv.planning import pipeline as conversion
from mlx_optiq_ext.kv.planning.kv_sensitivity import measure
from mlx_optiq_ext.kv.planning.plan_search import choose, judged
from mlx_optiq_ext.planning.journal import Journal


@pytest.fixture(scope="module")
def measured(exact, tiny):
    """The tiny model's keys and values, measured on short sequences."""
    text, sampling = tiny.parent / "calibration.jsonl", replace(conversion.LONG, length=96)
    return conversion.plan_kv(str(exact), 4.0, calibration=text, sampling=sampling, progress=False)


def test_a_plan_keeps_its_budget_and_is_no_worse_than_uniform(measured):
    found, sensitivity = measured
    assert found.bits_per_element <= 4.0
    assert found.uniform is not None
    assert found.kl <= found.uniform[2]
    assert min(kl for _, kl in found.tried.values()) == found.kl
    assert sensitivity.bits_per_element(choose(sensitivity, 6.0)) <= 6.0


def test_finer_formats_lose_less(measured):
    _, sensitivity = measured
    for formats in sensitivity.kl.values():
        for turned in (False, True):
            same = {
                f.bits: kl
                for f, kl in formats.items()
                if f.group_size == 64 and (f.rotated or f.transformed) is turned
            }
            assert [same[bits] for bits in sorted(same)] == sorted(same.values(), reverse=True)


def test_more_budget_loses_less(measured):
    _, sensitivity = measured
    assert judged(sensitivity, choose(sensitivity, 8.0)) < judged(
        sensitivity, choose(sensitivity, 3.0)
    )


def test_an_impossible_budget_names_the_range(measured):
    with pytest.raises(BudgetError, match=r"take from 2\.531 to 9\.035 bits per element"):
        choose(measured[1], 2.2)


@pytest.mark.parametrize("alike", [False, True])
def test_what_is_no_number_is_refused_naming_the_layer(measured, alike):
    sensitivity = measured[1]
    wrong = {**sensitivity.kl, (2, "v"): dict.fromkeys(sensitivity.kl[2, "v"], float("nan"))}
    with pytest.raises(InputError, match=r"sensitivity of .*the values of layer 2 came out as nan"):
        choose(replace(sensitivity, kl=wrong), 5.0, alike=alike)


def test_what_was_measured_before_is_said_to_be_read(exact, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_OPTIQ_EXT_CACHE", str(tmp_path / "kept"))
    text, sampling = tiny.parent / "calibration.jsonl", replace(conversion.LONG, length=32)
    lines: list[str] = []
    for budget in (4.0, 5.0):
        conversion.plan_kv(
            *(str(exact), budget),
            calibration=text,
            sampling=sampling,
            progress=False,
            say=lines.append,
        )
    first, second = lines
    assert first.startswith("[optiq] Measuring keys and values at 32 tokens of context on 64 ")
    assert second.startswith("[optiq] Reading the measurements of keys and values at 32 tokens")
    assert second.endswith(f"(calibration.jsonl) from {tmp_path / 'kept'}")


def test_the_files_are_read_back(measured, tmp_path):
    found, sensitivity = measured
    conversion.write(tmp_path, found, sensitivity, model="tiny", budget=4.0)
    assert read_plan(tmp_path / "kv_config.json").layers == found.layers
    record = json.loads((tmp_path / "kv_sensitivity.json").read_text())
    assert record["achieved_bits"] == found.bits_per_element
    assert {entry["layer_idx"] for entry in record["layers"]} == set(range(6))


class Watched(Journal):
    """Counts the sides that are measured, and is interrupted behind one of them."""

    def __init__(self, stop: int | None = None):
        super().__init__({"model": "exact"})
        self.measured, self.stop = 0, stop

    def add_all(self, measured):
        super().add_all(measured)
        self.measured += 1
        if self.measured == self.stop:
            raise KeyboardInterrupt


def test_an_interrupted_measurement_goes_on_where_it_stopped(exact, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_OPTIQ_EXT_CACHE", str(tmp_path))
    model = mlx_lm.load(str(exact))[0]
    first, second = np.arange(2, 98, dtype=np.int32).reshape(2, 1, 48)
    with pytest.raises(KeyboardInterrupt):
        measure(model, first, second, journal=Watched(stop=4), progress=False)
    rest = Watched()
    found = measure(model, first, second, journal=rest, progress=False)
    assert rest.measured == len(found.kl) - 4
    again = Watched()
    assert measure(model, first, second, journal=again, progress=False).kl == found.kl
    assert again.measured == 0


def test_only_the_plan_is_written_beside_a_model(exact, tiny, tmp_path, run):
    folder = tmp_path / "model"
    shutil.copytree(exact, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calibration = tmp_path / "short.jsonl"
    lines = (tiny.parent / "calibration.jsonl").read_text().splitlines(keepends=True)
    calibration.write_text("".join(lines[:12]))
    options = ("--optiq-kv-budget", "4.5", "--optiq-kv-only", "--optiq-calibration", calibration)
    done = run("mlx_lm.convert", "--hf-path", folder, "--mlx-path", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert "Measuring keys and values: 100%" in done.stderr
    assert "[optiq] Warning: the calibration text (short.jsonl) has " in done.stdout
    assert "KL on held-out text of short.jsonl: 0." in done.stdout
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    new = {"kv_config.json", "kv_sensitivity.json", "kv_transforms.safetensors"}
    assert after.keys() - before.keys() == new
    assert {name: after[name] for name in before} == before
    assert not (tmp_path / "out").exists()


BAD = {
    "budget-word": (["--optiq-kv-budget", "x"], "'x' is not a number of bits per element"),
    "budget-small": (["--optiq-kv-budget", "2"], "'2' is not a number of bits per element"),
    "only": (["--optiq-kv-only"], "--optiq-kv-only needs --optiq-kv-budget"),
    "only-and-weights": (
        ["--optiq-kv-only", "--optiq-kv-budget", "4", "--optiq-budget", "4"],
        "--optiq-kv-only converts nothing: leave --optiq-budget out",
    ),
    "only-elsewhere": (
        ["--optiq-kv-only", "--optiq-kv-budget", "4"],
        "is not a folder with one",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_loaded(name, run, tmp_path):
    arguments, message = BAD[name]
    done = run("mlx_lm.convert", "--hf-path", tmp_path, "--mlx-path", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
