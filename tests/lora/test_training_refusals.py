"""What ``mlx_lm.lora`` refuses of our options, and when."""

import pytest

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
    "unknown key": ("optiq_rank: 3", "optiq_rank in the YAML file"),
    "unknown scaling": ("optiq_rank_scaling: by_magic", "by_magic"),
    "no scale": ("optiq_rank_scaling: by_bits\nlora_parameters: {rank: 8}", "scale is None"),
    "rank of text": ("optiq_no_compile: true\nlora_parameters: {rank: x}", "rank is 'x'"),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml_is_refused_before_anything_is_loaded(lora, tmp_path, capsys, name):
    text, message = BAD_YAML[name]
    (tmp_path / "c.yaml").write_text(text)
    flags = ("--train", "-c", tmp_path / "c.yaml")
    assert message in error_of(capsys, lora, tmp_path / "none", tmp_path, *flags, train=False)


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
