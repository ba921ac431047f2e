"""Where ``--optiq-kv`` and a notebook find a KV plan."""

import json

import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.kv import find_plan, parse_spec, plan_digest

LAYERS = [{"layer_idx": 1, "bits": 8, "group_size": 64}]


@pytest.fixture
def model(tmp_path):
    """A folder with the config of a model of two layers."""
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    return tmp_path


def write(path, layers=LAYERS):
    path.write_text(json.dumps(layers))
    return path


def test_auto_is_the_file_beside_the_model(model):
    file = write(model / "kv_config.json")
    plan = find_plan("auto", str(model))
    assert plan == find_plan(str(file))
    assert list(plan.layers) == [1]


def test_a_width_needs_no_file():
    assert find_plan("k8v4g32") == parse_spec("k8v4g32")


@pytest.mark.parametrize(
    ("text", "named", "message"),
    [
        ("auto", False, "name it with --model"),
        ("auto", True, "has no kv_config.json: write one with mlx_lm.convert --optiq-kv-budget"),
        ("", True, "no such file, and no width such as 4"),
        ("nowhere.json", True, "nowhere.json: no such file, and no width such as 4"),
    ],
)
def test_a_plan_that_is_not_there_is_refused_with_the_remedy(model, text, named, message):
    with pytest.raises(InputError, match=message):
        find_plan(text, str(model) if named else None)


@pytest.mark.parametrize(
    "config", [{"num_hidden_layers": 1}, {"text_config": {"num_hidden_layers": 1}}]
)
def test_a_plan_of_another_model_is_refused(model, config):
    write(model / "kv_config.json")
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="layer_idx 1 is not in a model of 1 layers"):
        find_plan("auto", str(model))


@pytest.mark.parametrize("config", ["[]", "{", '{"text_config": []}', '{"num_hidden_layers": "2"}'])
def test_a_config_that_does_not_say_is_left_to_mlx_lm(model, config):
    write(model / "kv_config.json")
    (model / "config.json").write_text(config)
    assert list(find_plan("auto", str(model)).layers) == [1]


def test_a_digest_is_of_what_a_plan_says_and_not_of_where_it_comes_from(tmp_path):
    one, same = (find_plan(str(write(tmp_path / name))) for name in ("a.json", "b.json"))
    other = find_plan(str(write(tmp_path / "c.json", [{"layer_idx": 1, "bits": 4}])))
    assert plan_digest(one) == plan_digest(same) != plan_digest(other)
