import mlx.core as mx
import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.yolo.reading.naming import canonical, matched, ultralytics


def test_both_names_of_every_tensor_have_one_canonical_form(tensors):
    forms = {canonical(theirs) for theirs, _, _ in tensors}
    assert len(forms) == len(tensors) == 594
    assert [canonical(theirs) for theirs, _, _ in tensors] == [
        canonical(ours) for _, ours, _ in tensors
    ]


def test_ultralytics_name_comes_back_from_the_canonical_one(tensors):
    for theirs, _, _ in tensors:
        assert ultralytics(canonical(theirs)) == theirs


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.23.cv4.1.2.bias", "model.layers.23.cv4.layer1.layers.2.bias"),
        ("model.23.cv4_kpts.0.weight", "model.layers.23.cv4_kpts.layer0.weight"),
        ("model.23.flow_model.s.0.2.bias", "model.layers.23.flow_model.s.layer0.layers.2.bias"),
        (
            "model.23.proto.feat_refine.1.conv.weight",
            "model.layers.23.proto.feat_refine.layer1.conv.weight",
        ),
        ("model.23.proto.semseg.2.bias", "model.layers.23.proto.semseg.layers.2.bias"),
        (
            "model.10.m.1.attn.qkv.conv.weight",
            "model.layers.10.m.psa1.attn.qkv.conv.weight",
        ),
    ],
)
def test_names_of_segmentation_and_pose_meet_too(theirs, ours):
    assert canonical(theirs) == canonical(ours)
    assert ultralytics(canonical(ours)) == theirs


@pytest.fixture
def expected(tensors):
    return {ours: shape for _, ours, shape in tensors}


@pytest.fixture
def kinds(expected):
    return {name: "conv" for name, shape in expected.items() if len(shape) == 4}


def equal(found, generated, tensors):
    return all(mx.array_equal(found[ours], generated[theirs]) for theirs, ours, _ in tensors)


def test_either_package_s_names_are_matched(generated, tensors, expected, kinds):
    assert equal(matched(generated, expected, kinds), generated, tensors)
    renamed = {ours: generated[theirs] for theirs, ours, _ in tensors}
    assert equal(matched(renamed, expected, kinds), generated, tensors)


def test_pytorch_s_layout_is_turned(generated, tensors, expected, kinds):
    turned = {k: v.transpose(0, 3, 1, 2) if v.ndim == 4 else v for k, v in generated.items()}
    turned["model.0.bn.num_batches_tracked"] = mx.array(7)
    assert equal(matched(turned, expected, kinds), generated, tensors)


def test_a_transposed_convolution_is_turned_its_own_way():
    weight = mx.random.normal((6, 2, 2, 5))  # out, height, width, in
    shapes = {"a.upsample.weight": (6, 2, 2, 5)}
    torch = {"a.upsample.weight": weight.transpose(3, 0, 1, 2)}
    found = matched(torch, shapes, {"a.upsample.weight": "conv_transpose"})
    assert mx.array_equal(found["a.upsample.weight"], weight)


def test_missing_unknown_and_misshapen_tensors_are_named(generated, expected, kinds):
    short = {k: v for k, v in generated.items() if k != "model.3.bn.bias"}
    with pytest.raises(InputError, match=r"model\.layers\.3\.bn\.bias is missing"):
        matched(short, expected, kinds)
    with pytest.raises(InputError, match=r"model\.3\.extra is unknown"):
        matched({**generated, "model.3.extra": mx.zeros(1)}, expected, kinds)
    with pytest.raises(InputError, match=r"has shape \(3,\), this YOLO26 needs \(64,\)"):
        matched({**generated, "model.3.bn.bias": mx.zeros(3)}, expected, kinds)
    with pytest.raises(InputError, match="two names"):
        matched({**generated, "model.layers.3.bn.bias": mx.zeros(64)}, expected, kinds)
