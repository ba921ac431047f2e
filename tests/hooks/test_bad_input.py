"""What a user can get wrong on the command line ends with one paragraph and writes nothing."""

from pathlib import Path

import pytest

BUDGET = "is not a number of bits per weight above 0 and up to 16, such as 4.5"
BOTH = "both decide how to quantize: leave one of them out"
CALIBRATION = ["--optiq-budget", "4", "--optiq-calibration"]

CASES = {
    "budget-word": (["--optiq-budget", "abc"], f"'abc' {BUDGET}"),
    "budget-zero": (["--optiq-budget", "0"], f"'0' {BUDGET}"),
    "budget-negative": (["--optiq-budget", "-1"], f"'-1' {BUDGET}"),
    "budget-too-large": (["--optiq-budget", "17"], f"'17' {BUDGET}"),
    "budget-nan": (["--optiq-budget", "nan"], f"'nan' {BUDGET}"),
    "budget-infinite": (["--optiq-budget", "inf"], f"'inf' {BUDGET}"),
    "budget-unknown-unit": (
        ["--optiq-budget", "8GX"],
        "'8GX' has an unknown unit: give KB, MB, GB",
    ),
    "budget-bits-unit": (["--optiq-budget", "4bpw"], "or bits per weight without a unit"),
    "budget-size-zero": (["--optiq-budget", "0GB"], f"'0GB' {BUDGET}"),
    "budget-share-zero": (["--optiq-budget", "0%"], f"'0%' {BUDGET}"),
    "budget-share-above": (["--optiq-budget", "101%"], "'101%' is more than the original"),
    "budgets-of-two-kinds": (
        ["--optiq-budget", "8GB,4.5"],
        "'8GB,4.5' mixes sizes with bits per weight: give budgets of one kind",
    ),
    "budgets-empty": (["--optiq-budget", "4.5,"], f"'' {BUDGET}"),
    "budgets-and-speed": (
        ["--optiq-budget", "4,5", "--optiq-min-tps", "40"],
        "--optiq-budget and --optiq-min-tps both decide the size",
    ),
    "budget-and-distance": (
        ["--optiq-budget", "4.5", "--optiq-max-kl", "0.1"],
        "--optiq-budget and --optiq-max-kl both decide the size",
    ),
    "distance-and-speed": (
        ["--optiq-min-tps", "40", "--optiq-max-kl", "0.1"],
        "--optiq-min-tps and --optiq-max-kl both decide the size",
    ),
    "distance-of-nothing": (["--optiq-max-kl", "0"], "'0' is not a KL divergence in nats per"),
    "distance-in-words": (["--optiq-max-kl", "near"], "'near' is not a KL divergence in nats per"),
    "distance-and-dry-run": (
        ["--optiq-max-kl", "0.1", "--optiq-dry-run"],
        "--optiq-dry-run needs --optiq-budget",
    ),
    "budgets-and-page": (
        ["--optiq-budget", "4,5", "--optiq-report", "plan.html"],
        "name a file that ends in .svg",
    ),
    "budgets-and-kv": (
        ["--optiq-budget", "4,5", "--optiq-kv-budget", "4"],
        "a list of budgets writes nothing: leave out --optiq-kv-budget",
    ),
    "drawing-of-a-conversion": (
        ["--optiq-budget", "4", "--optiq-report", "curve.svg"],
        "name a file that ends in .html",
    ),
    "dry-run-without-budget": (["--optiq-dry-run"], "--optiq-dry-run needs --optiq-budget"),
    "dry-run-of-a-speed": (
        ["--optiq-dry-run", "--optiq-min-tps", "1"],
        "--optiq-dry-run needs --optiq-budget, one or several",
    ),
    "dry-run-upload": (
        ["--optiq-budget", "4", "--optiq-dry-run", "--upload-repo", "me/model"],
        "--optiq-dry-run writes nothing: leave out --upload-repo",
    ),
    "budget-missing": (["--optiq-budget"], "--optiq-budget: expected one argument"),
    "bits-7": (["--optiq-budget", "4", "--optiq-bits", "4,7"], "that MLX packs: 2, 3, 4, 5, 6, 8"),
    "bits-empty": (["--optiq-budget", "4", "--optiq-bits", ""], "'' is not a comma-separated list"),
    "bits-word": (["--optiq-budget", "4", "--optiq-bits", "four"], "'four' is not a comma-sep"),
    "group-size-48": (
        ["--optiq-budget", "4", "--optiq-group-sizes", "48"],
        "'48' is not a comma-separated list of group sizes that MLX packs: 32, 64, 128",
    ),
    "sensitivity-unknown": (
        ["--optiq-budget", "4", "--optiq-sensitivity", "guess"],
        "argument --optiq-sensitivity: invalid choice: 'guess'",
    ),
    "quant-predicate": (
        ["--optiq-budget", "4", "--quant-predicate", "mixed_3_6"],
        f"--optiq-budget and --quant-predicate {BOTH}",
    ),
    "q-bits": (["--optiq-budget", "4", "--q-bits", "4"], f"--optiq-budget and --q-bits {BOTH}"),
    "q-group-size": (
        ["--optiq-budget", "4", "--q-group-size", "64"],
        f"--optiq-budget and --q-group-size {BOTH}",
    ),
    "q-mode": (
        ["--optiq-budget", "4", "--q-mode", "mxfp4"],
        f"--optiq-budget and --q-mode mxfp4 {BOTH}",
    ),
    "dequantize": (
        ["--optiq-budget", "4", "--dequantize"],
        f"--optiq-budget and --dequantize {BOTH}",
    ),
    "bits-without-budget": (
        ["--optiq-bits", "4"],
        "--optiq-bits needs --optiq-budget, such as --optiq-budget 4.5",
    ),
    "options-without-budget": (
        ["--optiq-group-sizes", "64", "--optiq-sensitivity", "kl"],
        "--optiq-group-sizes, --optiq-sensitivity needs --optiq-budget",
    ),
    "calibration-missing": (
        [*CALIBRATION, "missing.txt"],
        "file missing.txt (cannot read missing.txt: No",
    ),
    "calibration-folder": ([*CALIBRATION, "."], "cannot read the calibration file ."),
    "calibration-binary": ([*CALIBRATION, "binary.txt"], "give a UTF-8 .txt or .jsonl file"),
    "calibration-empty": ([*CALIBRATION, "empty.txt"], "file empty.txt is empty: give it some"),
    "calibration-blank-lines": ([*CALIBRATION, "blank.jsonl"], "file blank.jsonl is empty"),
    "calibration-broken-line": ([*CALIBRATION, "broken.jsonl"], "broken.jsonl, line 3 is not JSON"),
    "calibration-other-fields": ([*CALIBRATION, "other.jsonl"], "other.jsonl, line 1 has no text"),
}


@pytest.fixture
def inputs(command):
    """Calibration files in the working folder of the command."""
    Path("binary.txt").write_bytes(b"\xff\xfe\x00text")
    Path("empty.txt").write_text(" \n")
    Path("blank.jsonl").write_text("\n\n")
    Path("broken.jsonl").write_text('{"text": "fine"}\n\n{"text": \n')
    Path("other.jsonl").write_text('{"content": "x"}\n')
    return sorted(Path().iterdir())


@pytest.mark.parametrize(("arguments", "message"), CASES.values(), ids=CASES.keys())
def test_it_is_refused_before_anything_is_loaded_or_written(command, inputs, arguments, message):
    # The model does not exist: reaching the loader would be another error.
    outcome = command("convert", "--hf-path", "no/such-model", *arguments)
    assert outcome.status == 2
    before, _, error = outcome.err.rpartition("mlx_lm.convert: error: ")
    assert before == ""  # no usage
    assert message in error
    assert error.count("\n") == 1
    assert outcome.out == ""
    assert sorted(Path().iterdir()) == inputs


def test_an_output_folder_that_exists_is_refused_and_left_alone(command, tiny):
    Path("out").mkdir()
    Path("out", "precious").write_text("kept")
    arguments = ("--hf-path", tiny, "--mlx-path", "out", "--optiq-budget", "4")
    outcome = command("convert", *arguments)
    assert outcome.status == 2
    assert "out exists already: remove it or name another output folder" in outcome.err
    assert [path.name for path in Path("out").iterdir()] == ["precious"]


def test_an_error_of_ours_from_the_library_is_the_commands_own(command, tiny):
    outcome = command("convert", "--hf-path", tiny, "--optiq-budget", "1")
    assert outcome.status == 2
    error = outcome.err.splitlines()[-1]
    assert error.startswith("mlx_lm.convert: error: ")
    assert "Traceback" not in outcome.err
    assert list(Path().iterdir()) == []


def test_stocks_own_errors_stay_stock(command):
    Path("mlx_model").mkdir()
    with pytest.raises(ValueError, match="Cannot save to the path mlx_model"):
        command("convert", "--hf-path", "no/such-model")
