import json

import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.kv import LayerFormat, parse_spec, read_plan
from mlx_optiq_ext.kv.formats import Affine, TurboQuant
from mlx_optiq_ext.kv.plan import check_layers, entries

SPECS = {
    "4": LayerFormat(Affine(4, transformed=True), Affine(4, rotated=None), 1, 4),
    "4p": LayerFormat(Affine(4), Affine(4)),
    "k4pv8": LayerFormat(Affine(4), Affine(8)),
    "8": LayerFormat(Affine(8), Affine(8)),
    "8x": LayerFormat(Affine(8, transformed=True), Affine(8), 1, 4),
    "k8v4": LayerFormat(Affine(8), Affine(4, rotated=None)),
    "k8v4g32": LayerFormat(Affine(8, 32), Affine(4, 32, None)),
    "4r": LayerFormat(Affine(4, None, True), Affine(4, None, True)),
    "k4rv3g64": LayerFormat(Affine(4, 64, True), Affine(3, 64, None)),
    "k16v4": LayerFormat(None, Affine(4, rotated=None)),
    "4t": LayerFormat(TurboQuant(4), TurboQuant(4)),
    "k8v3tg32": LayerFormat(Affine(8, 32), TurboQuant(3)),
}


@pytest.mark.parametrize("text", SPECS)
def test_specs(text):
    plan = parse_spec(text)
    assert plan is not None
    assert plan.everywhere == SPECS[text]


@pytest.mark.parametrize("text", ["auto", "kv_config.json", "k4", "v4", "4bit", "k8v4g", ""])
def test_what_is_no_spec_is_left_to_be_a_file(text):
    assert parse_spec(text) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7", "bits 7 is none of"),
        ("k4v4g48", "group_size 48 is none of"),
        ("5t", "TurboQuant bits 5 is none of"),
        ("k4v4x", "only keys are transformed"),
    ],
)
def test_specs_that_mlx_cannot_pack(text, message):
    with pytest.raises(InputError, match=f"--optiq-kv {text}: {message}"):
        parse_spec(text)


ENTRY = {"layer_idx": 3, "bits": 8, "group_size": 64}
BAD = {
    "not JSON": ("[{", "is not JSON"),
    "not a list": (json.dumps({"layers": [ENTRY]}), "must be a JSON list"),
    "empty": ("[]", "must be a JSON list"),
    "not an object": ("[3]", "entry 0 is not an object"),
    "no layer": (json.dumps([{"bits": 8}]), "entry 0: layer_idx None is not a layer number"),
    "negative layer": (json.dumps([{**ENTRY, "layer_idx": -1}]), "layer_idx -1 is not a layer"),
    "layer is true": (json.dumps([{**ENTRY, "layer_idx": True}]), "layer_idx True is not a"),
    "twice": (json.dumps([ENTRY, ENTRY]), "entry 1: layer_idx 3 is named twice"),
    "bits 7": (json.dumps([{**ENTRY, "bits": 7}]), "entry 0: bits 7 is none of 2, 3, 4, 5, 6, 8"),
    "no bits": (json.dumps([{"layer_idx": 3}]), "entry 0: bits None is none of"),
    "bits in words": (json.dumps([{**ENTRY, "bits": "8"}]), "entry 0: bits '8' is none of"),
    "group 48": (json.dumps([{**ENTRY, "group_size": 48}]), "group_size 48 is none of 32, 64, 128"),
    "negative group": (json.dumps([{**ENTRY, "group_size": -64}]), "group_size -64 is none of"),
    "nothing packed": (json.dumps([{**ENTRY, "bits": 16}]), "quantizes neither keys nor values"),
    "unknown key": (json.dumps([{**ENTRY, "bitz": 8}]), "entry 0 has unknown keys: bitz"),
    "a method of two": (json.dumps([{**ENTRY, "method": ["affine"]}]), "is not known"),
    "unknown method": (json.dumps([{**ENTRY, "method": "magic"}]), "method 'magic' is not known"),
    "too many bits": (json.dumps([{**ENTRY, "method": "turboquant"}]), "TurboQuant bits 8 is none"),
    "a seed in words": (
        json.dumps([{"layer_idx": 0, "bits": 4, "method": "turboquant", "seed": "x"}]),
        "seed 'x' is not a number",
    ),
    "rotation in words": (
        json.dumps([{**ENTRY, "k_rotated": "yes"}]),
        "rotated 'yes' is not true or false",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_entry(name, tmp_path):
    text, message = BAD[name]
    path = tmp_path / "kv_config.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none\.json"):
        read_plan(tmp_path / "none.json")


def test_a_layer_that_the_model_does_not_have(tmp_path):
    path = tmp_path / "kv_config.json"
    path.write_text(json.dumps([ENTRY]))
    check_layers(read_plan(path), 4)
    with pytest.raises(InputError, match="layer_idx 3 is not in a model of 3 layers"):
        check_layers(read_plan(path), 3)


def test_a_plan_is_read_back_as_it_was_written(tmp_path):
    layers = {
        0: LayerFormat(Affine(8, 64), Affine(8, 64)),
        2: LayerFormat(Affine(4, 64, True), Affine(3, 32)),
        5: LayerFormat(None, Affine(6, 128)),
        6: LayerFormat(TurboQuant(4, 9), TurboQuant(4, 9)),
        7: LayerFormat(TurboQuant(3, 2), TurboQuant(4, 2)),
        8: LayerFormat(Affine(8, 64), TurboQuant(2)),
        9: LayerFormat(None, TurboQuant(1)),
        10: LayerFormat(TurboQuant(3, 2), TurboQuant(3, 7)),
        11: LayerFormat(Affine(4), Affine(4)),
    }
    path = tmp_path / "kv_config.json"
    path.write_text(json.dumps(entries(layers)))
    assert read_plan(path).layers == layers
    # The published form, and nothing else, where it can say it all.
    assert entries(layers)[0] == {"layer_idx": 0, "bits": 8, "group_size": 64}
