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
        assert f"\nmlx_lm.{command}: error: " in errors
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
