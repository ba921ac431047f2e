import mlx.core as mx
import pytest

from mlx_optiq_ext.model.layers import calls_replaced, decoder_layers, layer_index
from mlx_optiq_ext.model.replay import record, replayed

TOKENS = mx.array([[5, 9, 200, 31, 7], [8, 8, 100, 2, 64]])


def resumed(model, recording, start):
    with calls_replaced(decoder_layers(model), replayed(recording, start)):
        return model(TOKENS)


def test_a_replayed_prefix_gives_the_same_logits(loaded):
    model, _ = loaded
    plain = model(TOKENS)
    logits, recording = record(model, TOKENS)
    assert mx.array_equal(plain, logits)
    for start in range(len(decoder_layers(model)) + 1):
        assert mx.array_equal(plain, resumed(model, recording, start))


def test_a_change_after_the_start_shows_and_one_before_it_does_not(loaded):
    model, _ = loaded
    plain, recording = record(model, TOKENS)
    model.layers[1].mlp.up_proj.weight = model.layers[1].mlp.up_proj.weight * 2
    changed = model(TOKENS)
    assert not mx.allclose(plain, changed)
    assert mx.array_equal(changed, resumed(model, recording, 1))
    assert mx.array_equal(plain, resumed(model, recording, 2))


def test_the_layers_keep_their_class_even_after_an_error(loaded):
    model, _ = loaded
    before = [type(layer) for layer in model.layers]
    _, recording = record(model, TOKENS)
    recording[0].output = "not an array"
    with pytest.raises(Exception, match=r".+"):
        mx.eval(resumed(model, recording, 1))
    assert [type(layer) for layer in model.layers] == before


def test_paths_are_mapped_to_their_layer(loaded):
    index = layer_index(loaded[0])
    assert index["model.layers.1.mlp.up_proj"] == 1
    assert index["model.layers.0"] == 0
    assert "model.embed_tokens" not in index
