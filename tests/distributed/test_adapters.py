"""Adapters on layers that mlx-lm splits over ranks, each architecture in its own way."""

import importlib
import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import toy_models
from mlx_lm.utils import load_model, save_model
from toy_adapters import write_everywhere
from toy_qwen3 import TINY

from mlx_optiq_ext.adapters import AdapterActivation, mount_adapter_on_model

from .conftest import needs_split_server

pytestmark = needs_split_server

TOKENS = [[3, 14, 15, 9, 26, 5, 35, 8], [2, 71, 82, 81, 82, 84, 59, 4]]


def splitting(how: str, *names: str) -> list[str]:
    """Those architectures that the installed mlx-lm splits."""
    found = []
    for name in filter(toy_models.FAMILIES.__contains__, names):
        module = importlib.import_module(f"mlx_lm.models.{name}")
        by = (module, "PipelineMixin") if how == "pipeline" else (module.Model, "shard")
        found += [name] if hasattr(*by) else []
    return found


#: With fused and repeated projections, experts, and latent attention.
BY_HEADS = splitting("tensor", "qwen3", "qwen3_moe", "qwen3_5", "gpt_oss", "deepseek_v3")
BY_LAYERS = splitting("pipeline", "qwen3_moe", "qwen3_5", "deepseek_v3", "ministral3")

COMPUTE = """
import json, sys
import mlx.core as mx
from mlx_lm.utils import sharded_load
from mlx_optiq_ext import distributed
from mlx_optiq_ext.adapters import AdapterActivation, mount_adapter_on_model, unmount
from mlx_optiq_ext.adapters.activation import Rows

how, tokens, *folders = sys.argv[1:]
group, tokens = mx.distributed.init(), mx.array(json.loads(tokens))
found = {}

def logits(model, selection=None):
    # One at a time: what is computed together may be sent in another order on each rank.
    with AdapterActivation(selection):
        result = model(tokens)
    mx.eval(result)
    return result

for folder in folders:
    model, _ = sharded_load(folder, *((group, None) if how == "pipeline" else (None, group)))
    base = logits(model)
    own = mount_adapter_on_model(model, "own", folder + "/adapter")
    found[folder + " all"] = logits(model, "own")
    found[folder + " rows"] = logits(model, Rows((None, own)))
    found[folder + " base"] = logits(model)
    assert mx.array_equal(base, found[folder + " base"])
    unmount(model, "own")
    assert mx.array_equal(base, logits(model))
mx.savez(f"found-{distributed.rank()}.npz", **{k.replace("/", "|"): v for k, v in found.items()})
"""


def write(folder: Path, name: str, bits: int | None = None) -> Path:
    """A random model with two heads of keys and values, and an adapter for all linear layers."""
    config = toy_models.config(name)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    heads |= {"linear_num_value_heads": 4, "linear_num_key_heads": 4}
    config |= heads
    if "text_config" in config:
        config["text_config"] |= heads
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
        config["quantization"] = {"group_size": 32, "bits": bits}
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, folder)
    write_everywhere(folder / "adapter", load_model(folder)[0])
    return folder


def expected(folder: Path) -> dict[str, mx.array]:
    """What one process computes."""
    model, tokens = load_model(folder)[0], mx.array(TOKENS)
    base = model(tokens)
    mount_adapter_on_model(model, "own", folder / "adapter")
    with AdapterActivation("own"):
        adapted = model(tokens)
    assert largest(adapted - base) > 0.05 * largest(base)
    rows = mx.concatenate([base[:1], adapted[1:]])
    return {"all": adapted, "rows": rows, "base": base}


def test_ranks_with_a_part_of_the_heads_compute_what_one_process_does(launch, tmp_path):
    folders = [write(tmp_path / name, name) for name in BY_HEADS]
    folders += [write(tmp_path / f"qwen3-{bits}", "qwen3", bits) for bits in (4, 6)]
    check(launch, 2, "tensor", folders)


def test_ranks_with_a_part_of_the_layers_compute_what_one_process_does(launch, tmp_path):
    folders = [write(tmp_path / name, name) for name in BY_LAYERS]
    check(launch, 2, "pipeline", folders)


def test_more_ranks_than_heads_of_keys_and_values(launch, tmp_path):
    for name in splitting("tensor", "qwen3_5"):  # it repeats its heads
        check(launch, 4, "tensor", [write(tmp_path / name, name)])


def check(launch, count: int, how: str, folders: list[Path]) -> None:
    """Compare every rank's logits with those of one process."""
    cwd = folders[0].parent
    done = launch(count, "-c", COMPUTE, how, json.dumps(TOKENS), *folders, cwd=cwd)
    for rank in range(count):
        path = cwd / f"found-{rank}.npz"
        assert path.exists(), done.stdout + done.stderr
        found = mx.load(str(path))
        assert isinstance(found, dict)
        for folder in folders:
            for name, array in expected(folder).items():
                given = found[f"{folder} {name}".replace("/", "|")]
                close = mx.allclose(given, array, rtol=0, atol=1e-4 * largest(array)).item()
                assert close, (folder.name, name)


def largest(array: mx.array) -> float:
    return float(mx.abs(array).max())
