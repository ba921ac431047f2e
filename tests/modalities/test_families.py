"""Every kind of checkpoint, made text-only and loaded by bare mlx-lm."""

import mlx.core as mx
import mlx_lm
from safetensors import safe_open

from mlx_optiq_ext import modalities

from .checkpoints import PROCESSORS, TOKENS, text_class
from .conftest import load, names


def _stored(folder) -> set[str]:
    found: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="numpy") as tensors:
            found |= set(tensors.keys())
    return found


def test_bare_mlx_lm_loads_it_as_the_text_class(kind, converted):
    model = mlx_lm.load(str(converted.folder))[0]
    assert type(model) is text_class(kind)


def test_its_logits_are_those_of_the_wrapper(converted):
    model = mlx_lm.load(str(converted.folder))[0]
    expected, logits = converted.wrapper(TOKENS), model(TOKENS)
    # Not to the last bit: a threaded BLAS may sum the same products in another order.
    assert mx.allclose(logits, expected, rtol=1e-4, atol=1e-5).item()
    assert mx.any(logits != 0).item()


def test_its_logits_are_the_same_with_a_prompt_cache(converted):
    from mlx_lm.models.cache import make_prompt_cache

    model = mlx_lm.load(str(converted.folder))[0]
    cache = make_prompt_cache(model)
    model(TOKENS[:, :-1], cache=cache)
    reference = make_prompt_cache(converted.wrapper)
    converted.wrapper(TOKENS[:, :-1], cache=reference)
    logits = model(TOKENS[:, -1:], cache=cache)
    expected = converted.wrapper(TOKENS[:, -1:], cache=reference)
    assert mx.allclose(logits, expected, rtol=1e-4, atol=1e-4).item()


def test_it_stores_exactly_the_tensors_of_the_text_model(kind, converted):
    model = mlx_lm.load(str(converted.folder))[0]
    assert _stored(converted.folder) == names(model) == names(converted.text.model)


def test_no_tower_is_left(kind, converted):
    assert not any(modalities.in_tower(name) for name in _stored(converted.folder))
    assert set(converted.text.report.tensors) >= set(kind.towers)
    assert any(modalities.in_tower(name) for name in _stored(converted.source))


def test_no_config_key_of_another_modality_is_left(converted):
    assert not [key for key in converted.config if modalities.is_modal(key)]
    assert "vision_config" not in converted.config
    assert "audio_config" not in converted.config
    assert "ConditionalGeneration" not in converted.config["architectures"][0]
    gone = {key for key in converted.text.report.keys if modalities.is_modal(key)}
    assert "vision_config" in gone or "video_token_id" in gone


def test_no_processor_file_is_left_but_the_chat_template_is(converted):
    assert not [name for name in PROCESSORS if (converted.folder / name).exists()]
    assert (converted.folder / "chat_template.jinja").exists()


def test_it_takes_fewer_bytes(converted):
    size = {
        folder: sum(p.stat().st_size for p in folder.glob("model*.safetensors"))
        for folder in (converted.source, converted.folder)
    }
    assert size[converted.folder] < size[converted.source]
    assert converted.text.report.bytes > 0


def test_it_stops_at_the_same_tokens_and_keeps_its_dtype(converted):
    source = load(converted.source)[1].eos_token_ids
    assert source == mlx_lm.load(str(converted.folder))[1].eos_token_ids
    config = converted.config
    dtype = config.get("torch_dtype") or config["text_config"].get("dtype")
    assert dtype == "float32"


def test_a_second_time_nothing_is_left_to_do(converted):
    model, _, config = mlx_lm.load(str(converted.folder), return_config=True)  # pyright: ignore
    assert modalities.to_text(model, config) is None
