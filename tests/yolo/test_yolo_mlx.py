"""With yolo-mlx, in an environment of its own: ``nox -f compat/noxfile.py -s yolo``."""

import importlib
import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_optiq_ext import yolo
from mlx_optiq_ext.errors import BudgetError, InputError

from .conftest import SIZE
from .test_torch_file import Tensor, module, save, torch  # noqa: F401  (a fixture)

pytestmark = pytest.mark.yolo


def bare(path):
    """What yolo-mlx alone makes of a file."""
    return importlib.import_module("yolo26mlx").YOLO(str(path), verbose=False)


def mapped_names(wrapper, path):
    """(names yolo-mlx expects, names it finds in a file)."""
    expected = wrapper._get_param_names(wrapper.model.parameters())
    return expected, {wrapper._map_pytorch_to_mlx_name(name) for name in mx.load(str(path))}


@pytest.mark.parametrize("budget", [3.5, 5, 7])
def test_bare_yolo_mlx_finds_every_tensor_and_none_beside(converted, generated, budget):
    result = converted[budget]
    wrapper = bare(result.path)
    expected, found = mapped_names(wrapper, result.path)
    assert expected - found == set()
    assert found - expected == set()
    parameters = sum(array.size for array in generated.values())
    assert result.path.stat().st_size == result.plan.file_bytes <= budget * parameters / 8
    assert result.plan.file_bytes > 0.98 * budget * parameters / 8


@pytest.mark.parametrize("budget", [3.5, 5, 7])
def test_bare_yolo_mlx_detects_what_we_evaluated(converted, photos, budget):
    from mlx_optiq_ext.yolo import images, network

    path = converted[budget].path
    wrapper, own = bare(path), yolo.load(path).model
    for photo in images.find(photos):
        theirs = np.array(wrapper.predict(str(photo), conf=0.05, imgsz=SIZE)[0].boxes.data)
        ours = network.detections(own, images.fit(photo, SIZE), least=0.05)
        assert len(ours) > 0
        assert theirs.shape == ours.shape
        assert np.abs(theirs - ours).max() <= 1e-3


def test_a_larger_budget_strays_less(converted):
    errors = [converted[budget].plan.error.total for budget in (3.5, 5, 7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.5 * errors[0]


def test_less_is_held_in_memory(converted, checkpoint):
    from mlx_optiq_ext.yolo import network

    held = [
        sum(a.nbytes for a in network.parameters(yolo.load(path).model).values())
        for path in (converted[3.5].path, checkpoint)
    ]
    assert held[0] < 0.3 * held[1]


def test_the_record_says_what_was_done(converted, photos):
    record = json.loads((converted[5].path.parent / "optiq_metadata.json").read_text())
    assert record["target_bpw"] == 5
    assert record["achieved_bpw"] <= 5
    assert record["calibration"]["images"] == [f"{i}.png" for i in range(5)]
    assert len(record["per_layer"]) == 126
    unused = {path for path, choice in record["per_layer"].items() if choice["factor"] == 0}
    assert unused == {p for p in record["per_layer"] if ".23.cv2." in p or ".23.cv3." in p}


@pytest.mark.parametrize(
    ("task", "suffix", "scale", "classes"),
    [
        ("detect", "", "n", 3),
        ("segment", "-seg", "n", 80),
        ("pose", "-pose", "n", 1),
        ("detect", "", "s", 80),
    ],
)
def test_other_tasks_classes_and_scales(photos, tmp_path, task, suffix, scale, classes):
    from mlx_optiq_ext.yolo import network
    from mlx_optiq_ext.yolo.reading.checkpoint import Architecture

    model = network.build(Architecture(task, scale, classes))
    source = tmp_path / "any.safetensors"
    weights = {k: v for k, v in network.parameters(model).items() if not k.endswith("stride")}
    mx.save_safetensors(str(source), weights)
    result = yolo.run_yolo_pipeline(
        source, tmp_path / "out", calibration=photos, budget=5, image_size=SIZE
    )
    assert result.path.name == f"yolo26{scale}{suffix}.npz"
    assert result.plan.error is not None
    assert np.isfinite(result.plan.error.total)
    loaded = yolo.load(result.path.parent)
    assert loaded.nc == classes
    assert loaded.predict(str(photos / "0.png"), imgsz=SIZE, conf=0.0)[0].boxes.data.shape[1] == 6
    if classes != 3:  # bare yolo-mlx knows a file's usual number of classes only
        wrapper = bare(result.path)
        expected, found = mapped_names(wrapper, result.path)
        assert expected == found


def test_a_pytorch_file_gives_the_same_weights(generated, photos, tmp_path, torch, checkpoint):  # noqa: F811
    from mlx_optiq_ext.yolo import network

    def nested(prefix):
        below = {
            name[len(prefix) :]: array
            for name, array in generated.items()
            if name.startswith(prefix)
        }
        children = {name.split(".")[0] for name in below if "." in name}
        own = {
            name: Tensor(
                np.array(a.transpose(0, 3, 1, 2) if a.ndim == 4 else a, order="C"), "FloatStorage"
            )
            for name, a in below.items()
            if "." not in name
        }
        return module(torch, {c: nested(f"{prefix}{c}.") for c in children}, **own)

    root = nested("")
    root.names = {i: f"thing {i}" for i in range(80)}
    path = save(tmp_path / "yolo26n.pt", {"model": root, "ema": None}, torch)
    for name in torch:  # yolo-mlx looks for Ultralytics
        del sys.modules[name]
    read = yolo.read(path)
    assert read.names is not None
    assert read.names[79] == "thing 79"
    ours, theirs = (network.parameters(network.load(yolo.read(p))) for p in (path, checkpoint))
    assert all(mx.array_equal(ours[name], theirs[name]) for name in theirs)
    assert yolo.load(path).names[3] == "thing 3"


def test_bad_folders_and_images(checkpoint, photos, tmp_path, capsys):
    out = tmp_path / "out"

    def convert(**changes):
        options = {"calibration": photos, "budget": 5, "image_size": SIZE, **changes}
        return yolo.run_yolo_pipeline(checkpoint, out, **options)

    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no image"):
        convert(calibration=empty)
    (empty / "broken.jpg").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"no image can be read\. .*broken\.jpg is skipped"):
        convert(calibration=empty)
    with pytest.raises(InputError, match="is not a folder"):
        convert(calibration=photos / "0.png")
    with pytest.raises(InputError, match="not a positive multiple of 32"):
        convert(image_size=100)
    with pytest.raises(InputError, match="not above 0"):
        convert(budget=0)
    with pytest.raises(BudgetError, match=r"0\.1 bits per weight is too small"):
        convert(budget=0.1)
    assert not out.exists()
    for index in range(2):
        (empty / f"{index}.png").write_bytes((photos / f"{index}.png").read_bytes())
    (empty / "cut.png").write_bytes((photos / "0.png").read_bytes()[:200])
    result = convert(calibration=empty)
    said = capsys.readouterr().err
    assert "broken.jpg is skipped" in said
    assert "cut.png is skipped" in said
    assert sorted(p.name for p in result.path.parent.iterdir()) == [
        "optiq_metadata.json",
        "yolo26n.npz",
    ]
    with pytest.raises(InputError, match="exists already"):
        convert()


def test_protected_ends_keep_fine_codes(checkpoint, photos, tmp_path):
    result = yolo.run_yolo_pipeline(
        checkpoint, tmp_path / "out", calibration=photos, budget=5, image_size=SIZE, protect=True
    )
    stem = np.load(result.path)["model.0.conv.weight"]
    assert np.abs(stem.astype(int).reshape(16, -1)).max(1).min() >= 127


def test_without_mlx_lm_the_same_images_give_the_same_file(converted, checkpoint, photos, tmp_path):
    program = (
        "import sys; sys.modules['mlx_lm'] = None\n"
        "from mlx_optiq_ext.yolo import run_yolo_pipeline\n"
        "source, out, images = sys.argv[1:]\n"
        "print(run_yolo_pipeline(source, out, calibration=images, image_size=64).summary())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(checkpoint), str(tmp_path / "out"), str(photos)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "bits per weight" in done.stdout
    assert (tmp_path / "out" / "yolo26n.npz").read_bytes() == converted[5].path.read_bytes()


def test_the_command(run, checkpoint, photos, tmp_path):
    two = tmp_path / "two"  # one calibrates, one judges
    two.mkdir()
    for name in ("0.png", "1.png"):
        (two / name).write_bytes((photos / name).read_bytes())
    done = run(
        "mlx_lm.convert", "--optiq-model-type", "yolo", "--hf-path", checkpoint, "--mlx-path",
        tmp_path / "out", "--optiq-budget", "5", "--optiq-calibration", two, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "yolo26n.npz" in done.stdout
    assert "Warning: 2 images calibrate and judge" in done.stderr
    assert (tmp_path / "out" / "yolo26n.npz").stat().st_size <= 5 * 2_591_848 / 8
