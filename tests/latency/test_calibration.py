"""What is measured on this machine, how it is kept, and what predictions make of it."""

import itertools
import json
import time
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_optiq_ext.errors import InputError, OptiqError
from mlx_optiq_ext.latency import (
    Chip,
    Header,
    Layers,
    Measured,
    Products,
    Workload,
    demand,
    find_chip,
    layout_of,
    predict,
    probes,
    write_chip,
)
from mlx_optiq_ext.latency.calibration import calibrate, summary
from mlx_optiq_ext.latency.chips import calibrated_path

#: Probes that take no time to speak of.
SMALL = probes.Sizes(
    rows=64, packed_rows=64, columns=64, read_bytes=1 << 14, prompt=4, packed_prompt=4, heads=2,
    head=32, context=16, hidden=32, layers=1, steps=3,
)  # fmt: skip

MEASURED = Measured(
    launch_us=1e-6,
    gap_us=0,
    products=(
        Products("float32", 32, False, 40.0, 4.0),
        Products("float32", 5, True, 5.0, 0.1),
        Products("float32", 9, True, 9.0, 0.1),
        Products("bfloat16", 16, False, 2.0, 0.5),
        Products("bfloat16", 4.5, True, 0.05, 0.001),
    ),
    layers=(Layers("float32", 1e9, 1e9, 0), Layers("bfloat16", 1e9, 1e9, 0)),
)
CHIP = Chip("mine", "Mine", "apple", 40.0, 4.0, launch_us=1e-6, measured=MEASURED)


def layout(dtype, bits=None):
    """One square product."""
    width = {"F32": 4, "BF16": 2, "F16": 2}[dtype]
    norm = {"model.layers.0.input_layernorm.weight": Header(dtype, (1024,), 0)}
    path = "model.layers.0.mlp.up_proj"
    if bits is None:
        weight = Header(dtype, (1024, 1024), width << 20)
        return layout_of({}, {**norm, f"{path}.weight": weight})
    packed = {f"{path}.weight": Header("U32", (1024, 32 * bits), bits << 17)}
    scale = Header(dtype, (1024, 16), 16 * 1024 * width)
    packed |= {f"{path}.scales": scale, f"{path}.biases": scale}
    return layout_of({"quantization": {"bits": bits, "group_size": 64}}, norm | packed)


def rising_clock(step=1e-12):
    """Each interval is longer than the one before, and by more."""
    ticks = itertools.accumulate(n * n * step for n in itertools.count(1))
    return lambda: float(next(ticks))


@pytest.mark.parametrize(
    ("dtype", "bits", "decode", "prompt"),
    [
        ("F32", None, 40e9 / 2**22, 4e12 / 2**21),
        ("F32", 4, 5e9 / (5 * 2**17), 0.1e12 / 2**21),
        ("BF16", None, 2e9 / 2**21, 0.5e12 / 2**21),
        ("BF16", 4, 0.05e9 / (4.5 * 2**17), 0.001e12 / 2**21),
    ],
)
def test_a_measured_machine_is_predicted_by_dtype_and_quantization(dtype, bits, decode, prompt):
    found = demand(layout(dtype, bits), 0).seconds(CHIP)
    assert 1 / found["weights"] == pytest.approx(decode, rel=1e-6)
    many = demand(layout(dtype, bits), 0, prompt=10_000).seconds(CHIP)
    assert 10_000 / many["weights"] == pytest.approx(prompt, rel=1e-6)
    work = Workload(10_001, 1, step=10_000)
    assert predict(layout(dtype, bits), CHIP, work).prefill_tps == pytest.approx(prompt, rel=0.05)


def test_a_width_between_measured_ones_is_interpolated():
    rates = [MEASURED.rates("float32", bits, quantized=True).gbs for bits in (3, 5, 7, 9, 12)]
    assert rates == pytest.approx([5, 5, 7, 9, 9])


def test_a_prompts_products_take_what_their_rows_do_not_account_for():
    slow = replace(MEASURED.products[0], setup_ps=1e6)
    chip = replace(CHIP, measured=replace(MEASURED, products=(slow,)))
    plain, slower = (
        demand(layout("F32"), 0, prompt=10).seconds(c)["weights"] for c in (CHIP, chip)
    )
    assert slower == pytest.approx(2**20 * 1e-6 + 2 * 10 * 2**20 / 4e12, rel=1e-3)
    assert plain < slower
    step = demand(layout("F32"), 0)
    assert step.seconds(chip)["weights"] == step.seconds(CHIP)["weights"]


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16"), ("mlx.core.float16", "float16")],
)
@pytest.mark.parametrize("stale", ["float32", "bfloat16"])
def test_activations_have_the_dtype_of_the_tensors_not_of_the_config(stored, dtype, stale):
    headers = {"model.embed_tokens.weight": Header(stored, (8, 4), 0)}
    assert layout_of({"torch_dtype": stale}, headers).dtype == dtype
    packed = {
        "model.embed_tokens.weight": Header("U32", (8, 4), 128),
        "model.embed_tokens.scales": Header(stored, (8, 1), 0),
    }
    assert layout_of({"torch_dtype": stale}, packed).dtype == dtype
    assert layout_of({"torch_dtype": stale}, {}).dtype == stale


def test_wide_norms_widen_the_activations():
    config, embedding = {}, {"model.embed_tokens.weight": Header("BF16", (8, 4), 64)}
    wide = {"model.layers.0.input_layernorm.weight": Header("F32", (4,), 16)}
    inner = {"model.layers.0.linear_attn.norm.weight": Header("F32", (4,), 16)}
    assert layout_of(config, embedding | inner).dtype == "bfloat16"
    assert layout_of(config, embedding | wide).dtype == "float32"


def test_what_was_not_measured_is_refused_and_why():
    failed = replace(MEASURED, failed=("float16 products with 4-bit weights: no memory",))
    chip = replace(CHIP, measured=failed)
    with pytest.raises(InputError, match=r"float16 products.*no memory.*--optiq-calibrate-chip"):
        predict(layout("F16", 4), chip)
    bare = replace(CHIP, measured=replace(MEASURED, layers=()))
    with pytest.raises(InputError, match="attention and norms in float32 were not measured"):
        predict(layout("F32"), bare)


def test_launches_count_where_they_outlast_what_hides_them():
    model = layout("F32")
    step = demand(model, 0)
    work = 2**22 / 40e9

    def seconds(launch_us, gap_us):
        numbers = replace(MEASURED, launch_us=launch_us, gap_us=gap_us)
        return sum(step.seconds(replace(CHIP, measured=numbers)).values())

    assert seconds(0.01, 0) == pytest.approx(work, rel=1e-3)
    assert seconds(1.0, 0.5) == pytest.approx(work + 0.5e-6 * step.launches, rel=1e-3)
    assert seconds(1e6, 0.5) == pytest.approx(step.launches)


def test_a_calibration_is_kept_whole(tmp_path):
    path = tmp_path / "mine.json"
    write_chip(path, replace(CHIP, measured=replace(MEASURED, failed=("x: y",))))
    assert find_chip(str(path)) == replace(CHIP, measured=replace(MEASURED, failed=("x: y",)))


OLD = {"rates_gbs": [[32, 9.5]], "overlapped": False}
NEWER = {"measured": {"version": 99}}
WRONG = [
    (OLD, "by an earlier release: measure again with --optiq-calibrate-chip"),
    (NEWER, "another version than .*: measure again with --optiq-calibrate-chip"),
    ({"measured": {"launch_us": 1}}, "another version"),
    ({"measured": 7}, "measured is 7"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_a_calibration_of_another_version_is_refused_in_one_line(fields, message):
    base = {"bandwidth_gbs": 9.5, "tflops": 0.1, "launch_us": 6.5}
    calibrated_path().parent.mkdir(parents=True)
    calibrated_path().write_text(json.dumps({**base, **fields}))
    with pytest.raises(InputError, match=message) as caught:
        find_chip("auto")
    assert "\n" not in str(caught.value)


DAMAGED = [
    ("launch_us", 0), ("gap_us", -1), ("products", [{"dtype": "int8"}]), ("products", {}),
    ("layers", [7]), ("failed", [None]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), DAMAGED)
def test_a_damaged_calibration_is_refused_with_the_field(tmp_path, name, value):
    path = tmp_path / "mine.json"
    write_chip(path, CHIP)
    content = json.loads(path.read_text())
    content["measured"][name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=name):
        find_chip(str(path))


def test_calibration_measures_every_dtype_and_kind():
    said = []
    chip = calibrate(sizes=SMALL, clock=rising_clock(), say=said.append)
    assert chip.measured is not None
    assert said == list(chip.measured.failed) == []
    kinds = {(p.dtype, p.bits, p.quantized) for p in chip.measured.products}
    widths = {"float32": (32, 3, 5, 9), "bfloat16": (16, 2.5, 4.5, 8.5)}
    widths["float16"] = widths["bfloat16"]
    assert kinds == {(d, b, b < 16) for d, own in widths.items() for b in own}
    assert {each.dtype for each in chip.measured.layers} == set(widths)
    assert chip.bandwidth_gbs > 0
    assert "bfloat16, generation and prompt" in summary(chip)
    write_chip(calibrated_path(), chip)
    assert find_chip("auto") == chip


def test_a_probe_that_fails_is_said_and_left_out(monkeypatch):
    def broken(*args, **settings):
        raise RuntimeError("no such kernel\nat some line")

    monkeypatch.setattr(mx, "quantized_matmul", broken)
    said = []
    chip = calibrate(sizes=SMALL, dtypes=("float32",), clock=rising_clock(), say=said.append)
    assert chip.measured is not None
    assert said[0] == "[optiq] Not measured: float32 products with 2-bit weights: no such kernel"
    assert len(said) == len(chip.measured.failed) == 3
    assert not any(p.quantized for p in chip.measured.products)
    with pytest.raises(InputError, match=r"float32 products with quantized weights.*such kernel"):
        predict(layout("F32", 4), chip)


def test_a_busy_cpu_is_told_to_measure_again():
    said, device = [], mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        calibrate(sizes=SMALL, dtypes=("float32",), clock=rising_clock(1.0), say=said.append)
    finally:
        mx.set_default_device(device)
    assert len(said) == 1
    assert "busy: the probes had 0% of a core" in said[0]


def test_times_that_make_no_rate_are_a_failure_not_a_rate():
    with pytest.raises(OptiqError, match=r"could not be measured \(kernel launches: more tokens"):
        calibrate(sizes=SMALL, clock=itertools.count().__next__, say=lambda line: None)


def test_the_small_model_is_counted_as_the_roofline_counts_it():
    model, own = probes.small_model(SMALL, mx.float32)
    assert own.dtype == "float32"
    assert len(own.caches) == SMALL.layers == len(list(model.layers or ()))
    # Seven products, two norms and nine more; an embedding that is the head, the last norm.
    assert demand(own, 0).launches == 20 + 18 * SMALL.layers + 3


def test_this_machine_is_predicted_from_its_own_numbers():
    sizes = replace(
        probes.CPU, rows=512, packed_rows=64, columns=512, read_bytes=1 << 21, layers=2,
        context=256, steps=6,
    )  # fmt: skip
    chip = calibrate(sizes=sizes, dtypes=("float32",), seconds=0.05, clock=time.process_time)
    assert chip.measured is not None
    assert chip.measured.launch_us >= chip.measured.gap_us >= 0
    plain, packed = (predict(layout("F32", bits), chip) for bits in (None, 4))
    assert 1 < plain.decode_tps < 1e6
    if mx.default_device() == mx.Device(mx.cpu):
        # Quantized products are a reference loop there, some thirty times slower.
        assert packed.prefill_tps < plain.prefill_tps
