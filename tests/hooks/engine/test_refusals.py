"""The gate keeps its word: a flag whose patches do not work is refused before anything is done."""

import json
from pathlib import Path

import pytest

import mlx_optiq_hooks
from mlx_optiq_hooks import tables

SABOTAGE = Path(__file__).with_name("sabotage.py")

CONVERT = ("convert", "--hf-path", "MODEL", "--mlx-path", "out", "--optiq-budget", "4.5")
CACHE = ("cache_prompt", "--model", "MODEL", "--prompt", "a", "--optiq-kv", "4")
SERVE = ("server", "--model", "MODEL", "--optiq-adapter", "a=MODEL")
TRAIN = ("lora", "--model", "MODEL", "--train", "--data", "MODEL", "--adapter-path", "out")

#: Feature -> a command with its flag, which would write or serve something.
COMMANDS = {
    "weights": CONVERT,
    "modalities": CONVERT,
    "kv": (*CACHE, "--prompt-cache-file", "out.safetensors"),
    "plugins": (*CACHE, "--prompt-cache-file", "out.safetensors"),
    "lora": (*TRAIN, "--optiq-rank-scaling", "by_bits"),
    "adapters": SERVE,
    "adapters_batched": SERVE,
    "prompts": ("server", "--model", "MODEL", "--optiq-prompt-cache", "prompts"),
    "serving": ("server", "--model", "MODEL", "--optiq-api-key", "secret"),
}
#: What only a run of several processes asks for.
DISTRIBUTED = {"sharded": ("server", "--model", "MODEL", "--optiq-kv", "4")}


def carried(features):
    """Those of the features that the installed mlx-lm has."""
    return [feature for feature in features if mlx_optiq_hooks.gate().states[feature].on]


def words(feature, tiny):
    return [word.replace("MODEL", str(tiny)) for word in (COMMANDS | DISTRIBUTED)[feature]]


def mine(feature):
    return [patch for patch in tables() if patch.feature == feature]


def check_refusals(outcomes, feature, command):
    modules = list(dict.fromkeys(patch.module for patch in mine(feature)))
    end = len(outcomes) - len(modules)
    raising, replaced, reloaded = outcomes[:1], outcomes[1:end], outcomes[end:]
    for _, status, errors in outcomes:
        assert status == 2
        assert f"\nmlx_lm.{command}: error: " in f"\n{errors}"
        assert "Traceback" not in errors
    for target, _, errors in raising:
        assert errors.endswith(
            f"error: {feature} needs a patch that failed ({target}: RuntimeError: broken patch): "
            "install a release of mlx-lm from the compat table\n"
        )
    assert [target for target, *_ in replaced] == [patch.target for patch in mine(feature)]
    for target, _, errors in replaced:
        module = target.partition(":")[0]
        assert errors.endswith(
            f"error: {feature} needs a patch that is gone ({target}): {module} was reloaded, or "
            "another tool put its own in its place: start anew without that\n"
        )
    assert [module for module, *_ in reloaded] == modules
    for module, _, errors in reloaded:
        # The command's own module takes the options with it.
        end = "unrecognized arguments: --optiq-" if module == f"mlx_lm.{command}" else f"({module}:"
        assert end in errors


def test_every_feature_with_patches_is_tried_here():
    features = {patch.feature for patch in tables()} - {"flags"}
    assert features == {*COMMANDS, *DISTRIBUTED}


@pytest.mark.parametrize("feature", carried(COMMANDS))
def test_a_failed_replaced_or_reloaded_patch_refuses_the_flag(run, tiny, tmp_path, feature):
    given = words(feature, tiny)
    done = run("python", SABOTAGE, feature, *given, cwd=tmp_path, check=True)
    check_refusals(json.loads(done.stdout), feature, given[0])
    assert list(tmp_path.iterdir()) == []


#: What another tool does before ``mlx_lm.lora`` runs.
MEDDLING = {
    "reloaded": "importlib.reload(lora)",
    "replaced": "lora.run.__globals__['run'] = lora.run.__wrapped__.__wrapped__",
    "rebound": "lora.linear_to_lora_layers = lambda *args, **kwargs: None",
}


@pytest.fixture
def yaml(tiny, tmp_path):
    """Words of a training whose options stand in a file."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_text('{"text": "a short text"}\n' * 4)
    file = tmp_path / "lora.yaml"
    file.write_text(
        f"model: {tiny}\ntrain: true\ndata: {data}\niters: 1\nbatch_size: 2\n"
        "num_layers: 1\noptiq_rank_scaling: by_bits\n"
    )
    return ["-c", file, "--adapter-path", tmp_path / "out"]


@pytest.mark.parametrize("form", [("mlx_lm.lora",), ("python", "-m", "mlx_lm.lora")])
def test_a_key_of_the_yaml_file_is_refused_as_a_flag_is(run, yaml, tmp_path, form):
    done = run(*form, *yaml, env={"MLX_OPTIQ_EXT_BLOCK": "lora"})
    assert done.returncode == 2
    assert done.stderr.endswith("mlx_lm.lora: error: lora is in MLX_OPTIQ_EXT_BLOCK: remove it\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", MEDDLING)
def test_nothing_is_trained_by_a_yaml_file_whose_keys_nobody_reads(run, yaml, tmp_path, how):
    code = f"import importlib, mlx_lm.lora as lora; {MEDDLING[how]}; lora.main()"
    done = run("python", "-c", code, *yaml)
    assert done.returncode != 0
    late = "mlx_lm.lora no longer calls what gives each layer its rank"
    assert late in done.stderr or "lora needs a patch that is gone" in done.stderr
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("feature", carried(DISTRIBUTED))
def test_so_it_does_on_several_ranks(launch, tiny, tmp_path, feature):
    given = words(feature, tiny)
    done = launch(2, SABOTAGE, feature, *given, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads(line) for line in done.stdout.splitlines()]
    assert [[status for _, status, _ in rank] for rank in ranks] == [[2] * len(ranks[0])] * 2
    # One rank speaks for both.
    check_refusals(next(rank for rank in ranks if rank[0][2]), feature, given[0])
    assert list(tmp_path.iterdir()) == []
