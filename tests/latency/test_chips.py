"""The chip table, other chips from files, and this machine's own."""

import json
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.latency import (
    FITTED,
    Chip,
    demand,
    detect,
    find_chip,
    known_chips,
    read_layout,
    write_chip,
)
from mlx_optiq_ext.latency.calibration import calibrate, summary
from mlx_optiq_ext.latency.plot import plot
from mlx_optiq_ext.latency.words import table


def test_the_table_has_every_apple_chip_and_nvidias():
    names = set(known_chips())
    for generation in range(1, 6):
        for variant in ("", "-pro", "-max"):
            assert any(n.startswith(f"m{generation}{variant}-") for n in names)
    assert {"m1-ultra-64", "m2-ultra-76", "m3-ultra-80", "h100", "h200", "b200", "gb10"} <= names
    assert all(chip.source and chip.bandwidth_gbs > 0 for chip in known_chips().values())
    assert all(name in table() for name in names)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("m4-max", "m4-max-32 or m4-max-40"),
        ("m4max-40", "m4-max-40"),
        ("h10", "h100"),
        ("x", "list"),
    ],
)
def test_an_unknown_chip_suggests_the_nearest(text, hint):
    with pytest.raises(InputError, match=hint):
        find_chip(text)


def display(model, cores):
    return json.dumps({"SPDisplaysDataType": [{"sppci_model": model, "sppci_cores": cores}]})


@pytest.mark.parametrize(
    ("apple", "nvidia", "found"),
    [
        (display("Apple M4 Max", "40"), "", "m4-max-40"),
        (display("Apple M1", "8"), "", "m1-8"),
        (display("Apple M3 Ultra", "60"), "", "m3-ultra-60"),
        ("", "NVIDIA H200\n", "h200"),
        ("", "NVIDIA GB10\n", "gb10"),
        ("", "NVIDIA GeForce RTX 4090\n", "rtx4090"),
        ("", "NVIDIA H100 80GB HBM3\nNVIDIA H100 80GB HBM3\n", "h100"),
        ("", "NVIDIA A100-SXM4-80GB\n", "a100-80"),
    ],
)
def test_this_machine_by_what_the_system_says(apple, nvidia, found):
    assert detect(lambda command: apple if "SPDisplays" in command[1] else nvidia).id == found


@pytest.mark.parametrize("said", ["", "nonsense", display("AMD Radeon", "8"), "[]"])
def test_an_unknown_machine_is_told_to_calibrate(said):
    with pytest.raises(InputError, match="--optiq-calibrate-chip"):
        detect(lambda command: said)


def test_a_file_describes_another_chip(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"bandwidth_gbs": 500, "tflops": 20, "generation": 4}')
    chip = find_chip(str(path))
    assert (chip.id, chip.family, chip.measured) == ("mine", "apple", False)
    write_chip(path, Chip("a", "A", "nvidia", 10.0, 1.0, launch_us=3.0))
    chip = find_chip(str(path))
    assert FITTED.bytes_per_second(chip) == 10e9
    assert FITTED.seconds_per_launch(chip) == pytest.approx(3e-6)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[]", "one JSON object"),
        ("{", "not JSON"),
        ('{"bandwidth_gbs": 500}', "tflops"),
        ('{"bandwidth_gbs": -1, "tflops": 2}', "bandwidth_gbs"),
        ('{"bandwidth_gbs": "fast", "tflops": 2}', "bandwidth_gbs"),
        ('{"bandwidth_gbs": 1, "tflops": 2, "colour": 3}', "colour"),
        ('{"bandwidth_gbs": 1, "tflops": 2, "family": "amd"}', "amd"),
        ('{"bandwidth_gbs": 1, "tflops": 2, "launch_us": 0}', "launch_us"),
        ('{"bandwidth_gbs": 1, "tflops": 2, "dies": 1.5}', "dies"),
        ('{"bandwidth_gbs": 1, "tflops": 2, "rates_gbs": 4}', "rates_gbs must be a list of pairs"),
        ('{"bandwidth_gbs": 1, "tflops": 2, "rates_gbs": [[4, "x"]]}', "rates_gbs 'x'"),
        ('{"bandwidth_gbs": 1, "tflops": 2, "overlapped": 1}', "overlapped"),
    ],
)
def test_a_wrong_file_is_refused_with_the_field(tmp_path, content, named):
    path = tmp_path / "chip.json"
    path.write_text(content)
    with pytest.raises(InputError, match=named):
        find_chip(str(path))


def test_calibration_takes_the_best_run_and_subtracts_launches():
    ticks = iter(range(10_000))
    # Every timed run lasts one second, by this clock.
    chip = calibrate(read_bytes=1 << 16, chain=6, side=16, clock=lambda: float(next(ticks)))
    assert chip.measured
    assert chip.launch_us == pytest.approx(1e6 / 6, rel=1e-3)
    assert chip.family in ("apple", "nvidia")
    assert "GB/s" in summary(chip)


@pytest.mark.newest
def test_calibration_measures_this_machine():
    chip = calibrate(read_bytes=1 << 26, chain=60, side=256)
    assert 0.1 < chip.bandwidth_gbs < 20_000
    assert chip.launch_us is not None
    assert 0.1 < chip.launch_us < 10_000
    assert mx.default_device() is not None


def test_a_measured_chip_reads_each_width_at_its_own_rate(tmp_path):
    path = tmp_path / "mine.json"
    rates = ((4.5, 100.0), (16.0, 400.0))
    write_chip(path, Chip("a", "A", "nvidia", 400.0, 1.0, launch_us=3.0, rates_gbs=rates))
    chip = find_chip(str(path))
    assert chip.rates_gbs == rates
    assert FITTED.bytes_per_second(chip) == 400e9
    found = [FITTED.bytes_per_second(chip, bits) for bits in (2.5, 4.5, 10.25, 32)]
    assert found == pytest.approx([100e9, 100e9, 250e9, 400e9])


def test_launches_count_where_they_outlast_what_they_overlap(tiny):
    layout = read_layout(tiny)
    step = demand(layout, 100.0)
    alone = Chip("a", "A", "nvidia", 1.0, 1e6, launch_us=1.0)
    apart = step.seconds(alone)
    together = step.seconds(replace(alone, overlapped=True))
    work = apart["weights"] + apart["cache"]
    assert 0 < apart["launches"] < work  # at 1 GB/s
    assert together == {**apart, "launches": 0.0}
    slow = step.seconds(replace(alone, overlapped=True, launch_us=1e6))
    assert sum(slow.values()) == pytest.approx(1e6 * apart["launches"])


def test_a_plot_is_valid_svg_with_every_curve():
    from xml.etree import ElementTree

    curves = {"4 bits": [(256.0, 100.0), (4096.0, 60.0)], "8 <bits>": [(256.0, 70.0)]}
    root = ElementTree.fromstring(plot(curves, "A & B"))
    text = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"4 bits", "8 <bits>", "A & B", "256", "4k"} <= set(text)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) == 2
    with pytest.raises(InputError, match="above 0"):
        plot({"none": []}, "empty")
