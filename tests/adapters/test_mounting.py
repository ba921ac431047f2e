"""Adapters on a model, one at a time: what is computed, what stays, what is refused."""

import asyncio
import threading
import time

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from toy_adapters import KEYS

from mlx_optiq_ext.adapters import (
    AdapterActivation,
    MountedLoRAEmbedding,
    MountedLoRALinear,
    mount_adapter_on_model,
    mounts_on,
    unmount,
)
from mlx_optiq_ext.errors import InputError, UnsupportedError

TOKENS = mx.array([[5, 9, 200, 31, 7, 2]])


def logits(model, adapter=None, tokens=TOKENS):
    with AdapterActivation(adapter):
        return model(tokens)


def close(found, expected):
    return mx.allclose(found, expected, rtol=1e-4, atol=1e-4).item()


def test_an_active_adapter_computes_what_mlx_lm_computes_with_it(exact, model, adapter):
    folder = adapter("A", rank=4)
    base = logits(model)
    mount_adapter_on_model(model, "A", folder)
    stock = mlx_lm.load(str(exact), adapter_path=str(folder))[0](TOKENS)
    assert close(logits(model, "A"), stock)
    assert not close(stock, base)
    assert mx.array_equal(logits(model), base)


@pytest.mark.parametrize("form", ["mixed", "rslora"])
def test_peft_adapters_mount(model, form, request):
    folder = request.config.rootpath / "tests" / "data" / "peft" / form
    base = logits(model)
    mounted = mount_adapter_on_model(model, "peft", folder)
    assert mounted.source == str(folder)
    assert not close(logits(model, "peft"), base)


def test_adapters_of_many_ranks_share_a_model(exact, model, adapter):
    ranks = {"a": 4, "b": 8, "c": 20, "d": 21, "e": 4}
    folders = {n: adapter(n, rank=rank, seed=i) for i, (n, rank) in enumerate(ranks.items())}
    for name, folder in folders.items():
        mount_adapter_on_model(model, name, folder)
    for name, folder in folders.items():
        stock = mlx_lm.load(str(exact), adapter_path=str(folder))[0](TOKENS)
        assert close(logits(model, name), stock), name
    # Ranks 20 and 21 are near enough to share a stack; 4 and 8 are not.
    layer = model.layers[0].self_attn.q_proj
    assert [(stack.rank, len(stack.members)) for stack in layer.mounted.stacks] == [
        (4, 2),
        (8, 1),
        (21, 2),
    ]


def test_memory_of_a_mounted_adapter_is_that_of_its_file(model, adapter):
    folders = [adapter(f"n{i}", rank=rank, seed=i) for i, rank in enumerate([8] * 6 + [3, 16])]
    size = sum((folder / "adapters.safetensors").stat().st_size for folder in folders)
    mx.eval(model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    for index, folder in enumerate(folders):
        mount_adapter_on_model(model, f"n{index}", folder)
    assert mx.get_active_memory() - before <= 1.1 * size


def test_unmounting_everything_restores_the_modules(model, adapter):
    before = dict(model.named_modules())
    parameters = dict(tree_flatten(model.parameters()))
    base = logits(model)
    mount_adapter_on_model(model, "A", adapter("A", keys=[*KEYS, "model.embed_tokens"]))
    mount_adapter_on_model(model, "B", adapter("B", seed=1, rank=6))
    assert isinstance(model.layers[0].mlp.down_proj, MountedLoRALinear)
    assert isinstance(model.model.embed_tokens, MountedLoRAEmbedding)
    trained = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert trained == []
    # Adapters are no parameters: what is saved or quantized is the base.
    assert len(tree_flatten(model.parameters())) == len(parameters)
    unmount(model, "A")
    assert not isinstance(model.model.embed_tokens, MountedLoRAEmbedding)
    unmount(model, "B")
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[path] is module for path, module in before.items())
    assert mx.array_equal(logits(model), base)


def test_the_tied_head_is_adapted_with_the_embedding(exact, model, adapter):
    folder = adapter("E", keys=["model.embed_tokens"])
    mount_adapter_on_model(model, "E", folder)
    stock = mlx_lm.load(str(exact), adapter_path=str(folder))[0](TOKENS)
    assert close(logits(model, "E"), stock)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantized_layers_take_adapters_at_all_bits(model, adapter, bits):
    folder = adapter("A", keys=[*KEYS, "model.embed_tokens"])
    nn.quantize(model, group_size=64, bits=bits)
    whole = type(model)(model.args)  # the same weights, unpacked
    nn.quantize(whole, group_size=64, bits=bits)
    whole.update(model.parameters())
    base = logits(model)
    mount_adapter_on_model(model, "A", folder)
    mlx_lm.utils.load_adapters(whole, str(folder))
    assert close(logits(model, "A"), whole(TOKENS))
    assert mx.array_equal(logits(model), base)


@pytest.mark.parametrize("stored", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("computed", [mx.float32, mx.bfloat16])
def test_the_dtype_of_activations_stays(model, adapter, stored, computed):
    model.set_dtype(computed)
    base = model(TOKENS[:, :2])
    mount_adapter_on_model(model, "A", adapter("A", dtype=stored))
    found = logits(model, "A", TOKENS[:, :2])
    assert found.dtype == base.dtype == computed
    assert not mx.array_equal(found, base)


def test_threads_and_tasks_see_only_their_own_activation(model, adapter):
    for index, name in enumerate("AB"):
        mount_adapter_on_model(model, name, adapter(name, seed=index))
    expected = {name: mx.argmax(logits(model, name)[0, -1]).item() for name in (None, "A", "B")}
    assert len({logits(model, n)[0, -1, 0].item() for n in expected}) == 3
    seen = {}

    def work(name):
        with AdapterActivation(name):
            time.sleep(0.02)
            seen[name] = mx.argmax(model(TOKENS)[0, -1]).item()

    with AdapterActivation("B"):
        threads = [threading.Thread(target=work, args=(name,)) for name in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == expected

    async def task(name):
        with AdapterActivation(name):
            await asyncio.sleep(0.01)
            return mx.argmax(model(TOKENS)[0, -1]).item()

    async def all_tasks():
        return await asyncio.gather(*[task(name) for name in expected])

    assert asyncio.run(all_tasks()) == list(expected.values())


def test_activations_nest_and_end_with_an_exception(model, adapter):
    for index, name in enumerate("AB"):
        mount_adapter_on_model(model, name, adapter(name, seed=index))
    a, base = logits(model, "A"), logits(model)
    with AdapterActivation("A"):
        with pytest.raises(ZeroDivisionError), AdapterActivation("B"):
            raise ZeroDivisionError
        assert mx.array_equal(model(TOKENS), a)
        with AdapterActivation(None):
            assert mx.array_equal(model(TOKENS), base)


def test_a_name_that_is_not_mounted_is_refused(exact, model, adapter):
    folder = adapter("A")
    mount_adapter_on_model(model, "only here", folder)
    with pytest.raises(InputError, match="no adapter 'nowhere'"), AdapterActivation("nowhere"):
        pass
    with pytest.raises(InputError, match="no adapter 'nowhere' is mounted"):
        unmount(model, "nowhere")
    other = mlx_lm.load(str(exact))[0]
    mount_adapter_on_model(other, "there", folder)
    with pytest.raises(InputError, match="another model"), AdapterActivation("only here"):
        other(TOKENS)
    unmount(model, "only here")
    with pytest.raises(InputError, match="no adapter 'only here'"), AdapterActivation("only here"):
        pass


def test_the_same_weights_again_are_the_same_mount_and_others_replace_them(model, adapter):
    first = mount_adapter_on_model(model, "A", adapter("A"))
    assert mount_adapter_on_model(model, "A", adapter("A2")) is first
    other = mount_adapter_on_model(model, "A", adapter("A3", seed=3))
    assert other.version != first.version
    layer = model.layers[0].self_attn.q_proj
    assert [stack.members for stack in layer.mounted.stacks] == [(other,)]


def test_an_adapter_in_use_stays_until_its_last_use_ends(model, adapter):
    mounted = mount_adapter_on_model(model, "A", adapter("A"))
    mounts = mounts_on(model)
    assert mounts is not None
    mounts.use(mounted)
    with pytest.raises(InputError, match="in use"):
        unmount(model, "A")
    mounts.done(mounted)
    unmount(model, "A")
    assert not mounts.paths


def test_a_refused_adapter_leaves_the_model_as_it_was(model, adapter, request):
    before = dict(model.named_modules())
    with pytest.raises(UnsupportedError, match="DoRA"):
        mount_adapter_on_model(
            model, "D", request.config.rootpath / "tests" / "data" / "peft" / "dora"
        )
    folder = adapter("bad")
    tensors = mx.load(str(folder / "adapters.safetensors"))
    assert isinstance(tensors, dict)
    path = "model.layers.3.mlp.down_proj"
    mx.eval(tensors)
    tensors[f"{path}.lora_a"] = tensors[f"{path}.lora_a"][:-1]
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    with pytest.raises(InputError, match="does not fit"):
        mount_adapter_on_model(model, "bad", folder)
    assert dict(model.named_modules()).keys() == before.keys()
    mounts = mounts_on(model)
    assert mounts is not None
    assert mounts.names == {}


def test_a_model_that_was_loaded_with_an_adapter_is_refused(exact, adapter):
    folder = adapter("A")
    loaded = mlx_lm.load(str(exact), adapter_path=str(folder))[0]
    with pytest.raises(InputError, match="load it without"):
        mount_adapter_on_model(loaded, "A", folder)
