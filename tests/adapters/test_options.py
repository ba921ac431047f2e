"""Bad options are refused before the server starts, with one line."""

import shutil

import pytest


def refused(run, exact, *options):
    done = run("mlx_lm.server", "--model", exact, "--port", "0", *options)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("mlx_lm.server: error: ")
    return done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optiq-adapter", "sql"], "write NAME=PATH_OR_REPO"),
        (["--optiq-adapter", "a b=here"], "use up to 128 letters"),
        (["--optiq-adapter", "a=nowhere"], "no such folder, and no name of a repository"),
        (["--optiq-adapter", "default_model=FOLDER"], "is the base model's name"),
        (["--optiq-adapter", "a=FOLDER", "--optiq-adapter", "a=FOLDER"], "names 'a' twice"),
        (["--optiq-adapter", "a=FOLDER", "--adapter-path", "FOLDER"], "give that adapter a name"),
        (["--optiq-adapter", "a=FOLDER", "--optiq-max-adapters", "0"], "must be 1 or more"),
        (["--optiq-adapter", "a=FOLDER", "--optiq-max-adapter-rank", "0"], "must be 1 or more"),
        (["--optiq-adapter", "a=FOLDER", "--optiq-max-adapter-rank", "3"], "has rank 4 at"),
        (["--optiq-adapter", "a=FOLDER", "--optiq-max-adapter-bytes", "999"], "at most 999 are"),
        (["--optiq-allow-adapter-updates"], "go together"),
        (["--optiq-adapter-dir", "."], "go together"),
        (["--optiq-allow-adapter-updates", "--optiq-adapter-dir", "no"], "no such folder"),
    ],
)
def test_bad_options_are_refused(run, exact, adapter, options, message):
    folder = str(adapter("A"))
    options = [each.replace("FOLDER", folder) for each in options]
    assert message in refused(run, exact, *options)


def test_an_adapter_for_another_model_ends_the_server_at_start(run, exact, adapter):
    folder = adapter("A")
    config = (folder / "adapter_config.json").read_text()
    other = adapter("B", rank=6)
    shutil.copy(other / "adapters.safetensors", folder)
    assert config == (folder / "adapter_config.json").read_text()
    (folder / "adapters.safetensors").write_bytes(
        (folder / "adapters.safetensors").read_bytes().replace(b"layers.0.", b"layers.9.")
    )
    assert "which this model does not have" in refused(run, exact, "--optiq-adapter", f"a={folder}")


def test_adapters_need_a_base(run, adapter):
    done = run("mlx_lm.server", "--optiq-adapter", f"a={adapter('A')}")
    assert done.returncode == 2
    assert "name it with --model" in done.stderr
