"""tests/plugin_example, installed beside our wheel: every hook takes effect in real commands."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from toy_fixtures import PLAIN

pytestmark = [pytest.mark.build, pytest.mark.newest]

EXAMPLE = Path(__file__).resolve().parents[1] / "plugin_example"


@pytest.fixture(scope="module")
def python(environment, distributions, tmp_path_factory):
    """Runs python in an environment that has our wheel and the example."""
    home = environment()
    home.install(distributions.wheel)
    home.install(EXAMPLE)

    def python(*arguments):
        command = [str(home.python), *map(str, arguments)]
        working = tmp_path_factory.mktemp("working")
        return subprocess.run(command, capture_output=True, text=True, cwd=working)

    return python


@pytest.fixture
def convert(python, tiny, tmp_path):
    """Converts the tiny model; gives the finished process and the output folder."""

    def convert(*arguments):
        out = tmp_path / "out"
        source = ("--hf-path", tiny, "--mlx-path", out)
        return python("-m", "mlx_lm", "convert", *source, *arguments), out

    return convert


def printed_bits(done):
    assert done.returncode == 0, done.stderr
    found = re.search(r"with (\S+) bits per weight", done.stdout)
    assert found, done.stdout
    return float(found[1])


def test_its_predicate_decides_every_layer(convert):
    done, out = convert("-q", "--optiq-example-bits", "8")
    assert printed_bits(done) == pytest.approx(8.5, abs=0.05)
    settings = json.loads((out / "config.json").read_text())["quantization"]
    layers = [value for value in settings.values() if isinstance(value, dict)]
    assert len(layers) == 6 * 7 + 1
    assert {(each["bits"], each["group_size"]) for each in layers} == {(8, 64)}


def test_without_its_option_conversion_is_stock(convert):
    done, _ = convert("-q")
    assert printed_bits(done) == pytest.approx(4.5, abs=0.05)


def test_it_refuses_bad_input(convert):
    done, out = convert("--optiq-example-bits", "8")
    assert done.returncode == 2
    assert done.stderr.endswith("error: --optiq-example-bits needs -q\n")
    assert not out.exists()


def test_its_option_stands_in_the_help(python):
    done = python("-m", "mlx_lm", "convert", "--help")
    assert re.search(r"--optiq-example-bits N\s+Bits of every quantized layer\.", done.stdout)
    assert "--optiq-sensitivity {by-size," in done.stdout


def test_its_sensitivity_measures_for_a_budget(convert, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Mia buys 7 boxes of 12 apples. " * 40)
    method = ("--optiq-sensitivity", "by-size", "--optiq-calibration", text)
    done, out = convert(*PLAIN, "--optiq-budget", "5", *method)
    assert 4 < printed_bits(done) <= 5
    assert json.loads((out / "optiq_metadata.json").read_text())["method"] == "by-size"


CACHES = """
import sys, mlx_lm
from mlx_lm.models.cache import make_prompt_cache
model, _ = mlx_lm.load(sys.argv[1])
for size in (None, 64):
    caches = make_prompt_cache(model, max_kv_size=size)
    print(len(caches), type(caches[0]).__name__, getattr(caches[0], "max_size", None))
"""


def test_it_builds_the_prompt_cache_or_leaves_it_to_mlx_lm(python, tiny):
    assert python("-c", CACHES, tiny).stdout == "6 KVCache None\n6 RotatingKVCache 32\n"


def test_its_kv_format_is_one_more_letter(python, tiny):
    ask = ("-m", "mlx_lm", "generate", "--model", tiny, "--prompt", "How many?", "-m", "4")
    done = python(*ask, "--optiq-kv", "8s")
    assert done.returncode == 0, done.stderr
    assert "==========" in done.stdout
    refused = python(*ask, "--optiq-kv", "7s")
    assert "--optiq-kv 7s: int8 has 8 bits, not 7" in refused.stderr


ATTEND = """
import sys, mlx_lm
from mlx_lm.models.cache import make_prompt_cache
import mlx.core as mx
import optiq_example
from mlx_optiq_ext import kv
asked, attend = [], optiq_example.short_contexts
def noted(queries, keys, *rest):
    output = attend(queries, keys, *rest)
    asked.append((keys.shape[2], output is not None))
    return output
optiq_example.short_contexts = noted
model, _ = mlx_lm.load(sys.argv[1])
kv.mount(model, kv.parse_spec("8"))
asked.clear()
caches = kv.make_caches(model)
for length in (60, 10):
    mx.eval(model(mx.zeros((1, length), dtype=mx.int32), cache=caches))
print(sorted(set(asked)))
"""


def test_its_attention_backend_is_asked_first_and_may_decline(python, tiny):
    done = python("-c", ATTEND, tiny)
    assert done.stdout == "[(60, True), (70, False)]\n", done.stderr


ADAPT = """
import json, sys, mlx_lm
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
model, _ = mlx_lm.load(sys.argv[1])
model.freeze()
lora = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}
linear_to_lora_layers(model, 2, lora)
weights = dict(tree_flatten(model.trainable_parameters()))
print(json.dumps({name: list(value.shape) for name, value in weights.items()}))
folder = Path(sys.argv[2]); folder.mkdir()
mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": lora}
(folder / "adapter_config.json").write_text(json.dumps(config))
"""


def test_it_chooses_ranks_and_finds_the_adapter_by_its_name(python, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIQ_EXAMPLE_ADAPTERS", str(tmp_path))
    made = python("-c", ADAPT, tiny, tmp_path / "first")
    assert made.returncode == 0, made.stderr
    shapes = json.loads(made.stdout)
    ranks = {name: shape[-1] for name, shape in shapes.items() if name.endswith("lora_a")}
    assert ranks == {
        f"model.layers.{layer}.self_attn.{name}.lora_a": rank
        for layer in (4, 5)
        for name, rank in (("q_proj", 4), ("v_proj", 8))
    }
    ask = ("-m", "mlx_lm", "generate", "--model", tiny, "--prompt", "How many?", "-m", "4")
    done = python(*ask, "--adapter-path", "example:first")
    assert done.returncode == 0, done.stderr
    assert "==========" in done.stdout
    absent = python(*ask, "--adapter-path", "example:second")
    assert absent.returncode == 1
    assert str(tmp_path / "second") in absent.stderr


def test_it_has_its_line_in_the_status(python):
    done = python("-m", "mlx_optiq_ext")
    assert "plugins: optiq, example\n" in done.stdout
    assert "example: every hook is in use\n" in done.stdout
    assert done.stderr == ""
