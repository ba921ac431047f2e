"""The model card of a conversion, and its upload."""

import inspect
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from mlx_optiq_ext.planning.calibration import SAMPLED
from mlx_optiq_ext.weights.plan import Plan, Uniform
from mlx_optiq_ext.weights.precision import Precision
from mlx_optiq_ext.weights.report import card
from mlx_optiq_ext.weights.targets import Certificate

pytestmark = pytest.mark.newest

PLAN = Plan(
    precisions={"a": Precision(4, 64), "b": Precision(4, 64), "c": Precision(16, 0)},
    sensitivities={"a": 0.1, "b": 0.1, "c": 0.0},
    method="taylor",
    target_bpw=4.5,
    achieved_bpw=4.4321,
    kl=0.01234,
    below=Uniform(Precision(3, 64), 3.5, 0.4),
    above=Uniform(Precision(4, 32), 5.0, 0.009),
    calibration={"source": "text.jsonl", "sequences": 16, "length": 256, "sha256": "ab" * 32},
    versions={"mlx-optiq-ext": "0.1.0", "mlx": "0.32.4"},
)
ORIGIN = card.Origin("org/model", "mlx_lm.convert --hf-path org/model --optiq-budget 4.5", True)


@pytest.fixture
def folder(tmp_path):
    """A model's folder as mlx-lm leaves it."""
    (tmp_path / "README.md").write_text(
        "---\nlicense: apache-2.0\nlibrary_name: mlx\ntags:\n- mlx\n- code\n---\n\nold text\n"
    )
    (tmp_path / "model.safetensors").write_bytes(bytes(2500))
    return tmp_path


def yaml(folder) -> dict:
    """What the Hub reads of a card."""
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_the_card_says_what_was_measured_beside_uniform_quantization(folder):
    text = card.text(PLAN, ORIGIN, "me/it", folder)
    assert "| this model | 4.432 | 0.01234 | 2.50\N{NO-BREAK SPACE}kB |" in text
    assert "| uniform 3-bit g64 | 3.500 | 0.4 |  |" in text
    assert "| uniform 4-bit g32 | 5.000 | 0.009 |  |" in text
    assert "held-out text of text.jsonl" in text
    assert "16 sequences of 256 tokens" in text
    assert "2 x 4-bit g64" in text
    assert "mlx-optiq-ext 0.1.0, mlx 0.32.4" in text
    assert ORIGIN.command in text
    assert "[org/model](https://huggingface.co/org/model)" in text


def test_what_was_not_measured_is_not_there(folder):
    bare = replace(PLAN, kl=None, below=None, above=None, calibration={}, versions={})
    text = card.text(bare, card.Origin("model"), "it", folder)
    assert "| this model | 4.432 | not measured |" in text
    for word in ("uniform", "KL(", "Versions", "convert", "kv_config.json", "huggingface.co"):
        assert word not in text


def test_a_certificate_is_told(folder):
    found = Certificate(
        kl=0.0123,
        bound=0.0145,
        same_top=0.9,
        p99=0.2,
        by_kind={"text.jsonl": 0.0123, SAMPLED: 0.02},
        sequences=32,
        tokens=8192,
        text="ab" * 32,
    )
    text = card.text(replace(PLAN, certificate=found.entry()), ORIGIN, "me/it", folder)
    assert "With 95% confidence it is at most 0.0145" in text
    assert "most likely for 90.0%" in text
    assert "0.0123 on text of text.jsonl, 0.02 on text sampled from the model itself." in text
    line = found.summary()
    assert "at most 0.0145, on 8,192 tokens of held-out text of text.jsonl; same top" in line


def test_a_kv_plan_beside_the_weights_is_told(folder):
    (folder / "kv_config.json").write_text("[]")
    text = card.text(PLAN, ORIGIN, "me/it", folder)
    assert "mlx_lm.server --model me/it --optiq-kv auto" in text


@pytest.mark.parametrize("stocks", [True, False])
def test_the_hub_reads_the_card_and_keeps_what_stock_wrote_of_the_base(folder, stocks):
    if not stocks:
        (folder / "README.md").unlink()
    card.write(folder, PLAN, ORIGIN, "me/it")
    read = yaml(folder)
    assert read["base_model"] == "org/model"
    assert read["base_model_relation"] == "quantized"
    assert read["library_name"] == "mlx"
    assert read.get("license") == ("apache-2.0" if stocks else None)
    assert read["tags"] == ["mlx", *(["code"] if stocks else []), "mlx-optiq-ext"]
    text = ModelCard.load(folder / "README.md").text
    assert text.strip().startswith("# me/it")
    assert "old text" not in text


def test_a_local_original_is_no_base_on_the_hub(folder, tiny):
    card.write(folder, PLAN, card.Origin.of(tiny, []), "it")
    assert "base_model" not in yaml(folder)
    assert "`tiny-qwen3` with" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["--hf-path", "a/b", "--mlx-path", "out", "-q"], "--hf-path a/b -q"),
        (["--mlx-path=out", "--optiq-budget=4"], "--optiq-budget=4"),
        (["--mlx", "out", "--optiq-rep", "x.html", "--up", "me/it", "--dtype", "x"], "--dtype x"),
        (["--optiq-pin", "*.v_proj=8g64"], "--optiq-pin '*.v_proj=8g64'"),
        (["--optiq-calibration", "/home/me/text.jsonl"], "--optiq-calibration text.jsonl"),
        (["--hf-path=/home/me/model"], "--hf-path=model"),
    ],
)
def test_the_command_names_no_outputs_and_no_folder_of_the_machine(words, command):
    assert card.Origin.of("a/b", words).command == f"mlx_lm.convert {command}"


def test_an_upload_keeps_the_card(folder, monkeypatch, capsys):
    done = []

    def recorded(name):
        real = inspect.signature(getattr(huggingface_hub.HfApi, name))

        def call(self, **given):
            real.bind(self, **given)  # such as the installed release takes
            card_text = Path(given.get("folder_path", folder), "README.md").read_text()
            done.append((name, given["repo_id"], card_text))

        return call

    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, recorded(name))
    card.write(folder, PLAN, ORIGIN, "me/it")
    written = (folder / "README.md").read_text()
    card.upload(folder, "me/it")
    assert done == [("create_repo", "me/it", written), ("upload_folder", "me/it", written)]
    assert "https://huggingface.co/me/it" in capsys.readouterr().out
