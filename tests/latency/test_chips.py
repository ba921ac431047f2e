"""The chip table, other chips from files, and this machine's own."""

import json

import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.latency import FITTED, Chip, detect, find_chip, known_chips, write_chip
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
    assert (chip.id, chip.family, chip.measured) == ("mine", "apple", None)
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
    ],
)
def test_a_wrong_file_is_refused_with_the_field(tmp_path, content, named):
    path = tmp_path / "chip.json"
    path.write_text(content)
    with pytest.raises(InputError, match=named):
        find_chip(str(path))


def test_a_plot_is_valid_svg_with_every_curve():
    from xml.etree import ElementTree

    curves = {"4 bits": [(256.0, 100.0), (4096.0, 60.0)], "8 <bits>": [(256.0, 70.0)]}
    root = ElementTree.fromstring(plot(curves, "A & B"))
    text = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"4 bits", "8 <bits>", "A & B", "256", "4k"} <= set(text)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) == 2
    with pytest.raises(InputError, match="above 0"):
        plot({"none": []}, "empty")
