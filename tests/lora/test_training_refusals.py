"""What ``mlx_lm.lora`` refuses of our options, and when."""

import json

import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.lora import check_trained_tokens

from .conftest import BY_BITS, error_of

BAD = {
    "no training": (("--test", "--optiq-rank-scaling", "by_bits"), "need --train"),
    "full": ((*BY_BITS, "--train", "--fine-tune-type", "full"), "has no ranks"),
    "init alone": (("--train", "--optiq-init", "residual"), "--optiq-original"),
    "original alone": (("--train", "--optiq-original", "x"), "--optiq-init"),
    "no checkpoint": ((*BY_BITS, "--train", "--resume-adapter-file", "no"), "no such file"),
    "two readings": (("--optiq-info", "a", "--optiq-export-peft", "a"), "leave the other"),
    "no adapter": (("--optiq-info", "nowhere"), "nowhere"),
    "no folder": (("--optiq-export-peft", "nowhere"), "no such folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_loaded(lora, tmp_path, capsys, name):
    flags, message = BAD[name]
    assert message in error_of(capsys, lora, tmp_path / "none", tmp_path, *flags, train=False)


BAD_YAML = {
    "unknown key": ("optiq_rank: 3", "optiq_rank in the YAML file is not known: there are optiq_"),
    "unknown key with hyphens": ("optiq-rank: 3", "optiq-rank in the YAML file is not known"),
    "joined key": ("optiqrank: 3", "optiqrank in the YAML file is not known"),
    "option of reading": ("optiq-info: a", "optiq-info in the YAML file is not known"),
    "both spellings": (
        "optiq_no_compile: true\noptiq-no-compile: false",
        "optiq_no_compile and optiq-no-compile in the YAML file are the same: keep one",
    ),
    "unknown scaling with hyphens": (
        "optiq-rank-scaling: by_magic",
        "optiq-rank-scaling: 'by_magic' in the YAML file is none of ",
    ),
    "unknown scaling": ("optiq_rank_scaling: by_magic", "by_magic"),
    "no scale": ("optiq_rank_scaling: by_bits\nlora_parameters: {rank: 8}", "scale is None"),
    "scale of NaN": (
        "optiq_no_compile: true\nlora_parameters: {rank: 8, scale: .nan}",
        "scale is nan",
    ),
    "huge scale": ("optiq_no_compile: true\nlora_parameters: {rank: 8, scale: 1e+30}", "up to"),
    "no dropout": (
        "optiq_no_compile: true\nlora_parameters: {rank: 8, scale: 1.0, dropout: 1.5}",
        "dropout is 1.5",
    ),
    "rank of text": ("optiq_no_compile: true\nlora_parameters: {rank: x}", "rank is 'x'"),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml_is_refused_before_anything_is_loaded(lora, tmp_path, capsys, name):
    text, message = BAD_YAML[name]
    (tmp_path / "c.yaml").write_text(text)
    flags = ("--train", "-c", tmp_path / "c.yaml")
    assert message in error_of(capsys, lora, tmp_path / "none", tmp_path, *flags, train=False)


STOCK = ("--train", "--iters", 1, "--batch-size", 1, "--max-seq-length", 48, "--num-layers", -1)


def test_a_training_without_our_flags_does_not_lose_ranks_of_their_own(
    lora, packed, tmp_path, capsys
):
    folder = tmp_path / "a"
    lora(packed, folder, *BY_BITS, iters=1)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    resume = ("--resume-adapter-file", folder / "adapters.safetensors")
    said = error_of(capsys, lora, packed, tmp_path / "b", *STOCK, *resume, train=False)
    assert "has a rank of its own for each layer" in said
    assert "add --optiq-rank-scaling by_bits" in said
    assert not (tmp_path / "b").exists()
    said = error_of(capsys, lora, packed, folder, *STOCK, train=False)
    assert "--adapter-path" in said
    assert "or name another folder" in said
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_going_on_from_a_peft_file_is_refused(lora, tiny, recorded, tmp_path, capsys):
    resume = ("--resume-adapter-file", recorded / "mixed" / "adapter_model.safetensors")
    said = error_of(capsys, lora, tiny, tmp_path / "a", *STOCK, *resume, train=False)
    assert "is in PEFT's form (" in said
    assert "--optiq-export-peft" in said
    assert not (tmp_path / "a").exists()


@pytest.mark.newest  # older releases count the template's own end as trained
def test_masked_prompts_that_leave_nothing_to_train_on_are_named(tmp_path, capsys, lora, packed):
    data = tmp_path / "data"
    data.mkdir()
    # The model's chat template has no place for what the assistant says.
    rows = [{"prompt": f"How many? {n}", "completion": "Two."} for n in range(4)]
    for name in ("train", "valid", "test"):
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = (*BY_BITS, "--mask-prompt", "--data", data)
    said = error_of(capsys, lora, packed, tmp_path / "a", *flags)
    assert "--mask-prompt leaves no token to train on in 4 of 4 examples" in said
    assert "learning rate" not in said
    assert not (tmp_path / "a" / "adapters.safetensors").exists()


def test_a_batch_with_one_trained_token_is_enough():
    examples = [([1] * 9, 9), ([1] * 9, 8), ([1] * 20, 12), ([1] * 20, 3)]
    check_trained_tokens(examples, 2, 10)
    check_trained_tokens([([1], 0)], 1, 10)
    with pytest.raises(InputError, match="in 2 of 4 examples"):
        check_trained_tokens(examples, 1, 10)


def test_a_rank_larger_than_a_layer_is_refused(lora, packed, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("lora_parameters: {rank: 999, scale: 1.0, dropout: 0.0}")
    flags = (*BY_BITS, "-c", tmp_path / "c.yaml")
    assert "rank 999" in error_of(capsys, lora, packed, tmp_path / "a", *flags)
    assert not (tmp_path / "a").exists()


def test_the_wrong_original_is_refused(lora, packed, tmp_path, capsys):
    flags = ("--optiq-init", "residual", "--optiq-original", packed)
    assert "--optiq-original has no unquantized" in error_of(
        capsys, lora, packed, tmp_path / "a", *flags
    )
    assert not (tmp_path / "a").exists()
