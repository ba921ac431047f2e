"""What the flag refuses before anything is read, with or without yolo-mlx."""

import sys
from types import SimpleNamespace

import pytest

from mlx_optiq_ext.errors import OptiqError
from mlx_optiq_ext.planning import Budget
from mlx_optiq_hooks import builtin

NAMES = [
    "model_type",
    "budget",
    "calibration",
    "protect",
    "bits",
    "plan",
    "report",
    "kv_budget",
    "kv_only",
    "min_tps",
    "max_kl",
    "refine",
    "distill",
    "group_sizes",
    "sensitivity",
    "keep_unused_modalities",
]


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"never opened here")
    (tmp_path / "empty").mkdir()
    (tmp_path / "yolo26n.pt").write_bytes(b"never opened here")
    (tmp_path / "there").mkdir()
    return tmp_path


@pytest.fixture
def installed(monkeypatch):
    """As if yolo-mlx were there: nothing of it is used before the conversion starts."""
    monkeypatch.setattr("mlx_optiq_ext.yolo.network.library", lambda: None)


def check(folder, stock=None, **given):
    options = dict.fromkeys(NAMES)
    options |= {
        "model_type": "yolo",
        "budget": (Budget(5.0),),
        "calibration": folder / "images",
        **given,
    }
    args = {"hf_path": folder / "yolo26n.pt", "mlx_path": folder / "out", "quantize": False}
    args |= {"q_mode": "affine", **(stock or {})}
    return builtin.optiq_check_options(
        command="convert", options=SimpleNamespace(**options), args=SimpleNamespace(**args)
    )


def test_a_whole_command_line_runs_in_place_of_the_conversion(folder, installed):
    assert callable(check(folder))
    assert callable(check(folder, protect=True))


def test_without_the_flag_it_is_a_conversion_of_a_language_model(folder, tiny):
    unused = dict.fromkeys(("quant_predicate", "q_bits", "q_group_size", "dequantize"))
    stock = {**unused, "hf_path": str(tiny)}
    assert check(folder, stock, model_type=None, calibration=None) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": None}, "needs --optiq-budget, such as --optiq-budget 5"),
        ({"calibration": None}, "needs --optiq-calibration with a folder of a few images"),
        ({"bits": (4,)}, "does not go with --optiq-bits"),
        ({"plan": "p.json", "effort": "refine"}, "does not go with --optiq-effort, --optiq-plan"),
        ({"kv_budget": 4.5}, "does not go with --optiq-kv-budget"),
        ({"stock": {"quantize": True}}, "does not go with --quantize"),
        ({"stock": {"dtype": "float16"}}, "does not go with --dtype"),
        ({"stock": {"upload_repo": "me/it"}}, "does not go with --upload-repo"),
        ({"calibration": "images/a.png"}, "is not a folder"),
        ({"calibration": "empty"}, "holds no image"),
        ({"stock": {"hf_path": "none.pt"}}, r"none\.pt is not a file"),
        ({"stock": {"mlx_path": "there"}}, "exists already"),
    ],
)
def test_other_command_lines_are_refused(folder, installed, monkeypatch, given, message):
    monkeypatch.chdir(folder)
    with pytest.raises(OptiqError, match=message):
        check(folder, **given)


def test_without_yolo_mlx_the_remedy_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "yolo26mlx", None)
    monkeypatch.setitem(sys.modules, "yolo26mlx.nn.tasks", None)
    with pytest.raises(OptiqError, match=r"needs yolo-mlx .* pip install 'mlx-optiq-ext\[yolo\]'"):
        check(folder)
