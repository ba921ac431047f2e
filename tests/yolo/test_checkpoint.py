import mlx.core as mx
import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.yolo.reading.checkpoint import Architecture, identify, read


def test_a_generated_yolo26n_is_recognised(checkpoint, generated):
    found = read(checkpoint)
    assert found.architecture == Architecture("detect", "n", 80)
    assert found.architecture.name == "yolo26n"
    assert found.weights.keys() == generated.keys()


def test_yolo_mlx_s_names_and_npz_are_read_too(generated, tensors, tmp_path):
    path = tmp_path / "x.npz"
    mx.savez(str(path), **{ours: generated[theirs] for theirs, ours, _ in tensors})
    assert read(path).architecture == Architecture("detect", "n", 80)


def scaled(generated, channels, deep=False):
    arrays = {**generated, "model.0.conv.weight": mx.zeros((channels, 3, 3, 3))}
    return {**arrays, "model.2.m.1.cv1.conv.weight": mx.zeros((8, 3, 3, 16))} if deep else arrays


@pytest.mark.parametrize(
    ("channels", "deep", "scale"),
    [(16, False, "n"), (32, False, "s"), (64, False, "m"), (64, True, "l"), (96, True, "x")],
)
def test_scales_are_told_apart_by_stem_and_depth(generated, channels, deep, scale):
    assert identify(scaled(generated, channels, deep)).scale == scale


def test_tasks_are_told_apart_by_their_heads(generated):
    def with_part(name):
        return identify({**generated, f"model.23.{name}": mx.zeros(1)})

    assert with_part("proto.cv1.conv.weight").name == "yolo26n-seg"
    assert with_part("cv4_kpts.0.weight").name == "yolo26n-pose"
    with pytest.raises(InputError, match=r"oriented boxes \(OBB\)"):
        with_part("cv4.0.0.conv.weight")
    with pytest.raises(InputError, match="a classification network"):
        with_part("linear.weight")


@pytest.mark.parametrize("gone", ["model.0.conv.weight", "model.23.one2one_cv3.1.2.weight"])
def test_other_networks_are_refused(generated, gone):
    with pytest.raises(InputError, match="not a YOLO26 checkpoint"):
        identify({k: v for k, v in generated.items() if k != gone})


def test_a_language_model_is_refused_by_name(tiny):
    with pytest.raises(InputError, match=r"model\.safetensors: not a YOLO26 checkpoint"):
        read(tiny / "model.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_files_are_refused(checkpoint, generated, tmp_path, suffix, keep):
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".npz":
        mx.savez(str(whole), **generated)
    else:
        whole.write_bytes(checkpoint.read_bytes())
    data = whole.read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match=rf"cut{suffix} is damaged or not a {suffix} file"):
        read(path)


def test_a_flipped_byte_in_an_npz_is_noticed(generated, tmp_path):
    path = tmp_path / "x.npz"
    mx.savez(str(path), **generated)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="is damaged"):
        read(path)


def test_missing_files_folders_and_other_suffixes_are_refused(tmp_path):
    with pytest.raises(InputError, match="is not a file"):
        read(tmp_path / "none.pt")
    with pytest.raises(InputError, match="is not a file"):
        read(tmp_path)
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(InputError, match=r"neither \.pt nor"):
        read(tmp_path / "a.onnx")
