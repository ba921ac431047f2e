"""``--optiq-kv`` in every stock command that runs a model: each layer holds its own bits."""

import json
import subprocess
import sys

import pytest

from .conftest import PROBLEMS, held, planned, probe

COMMANDS = {
    "generate": ["--prompt", PROBLEMS[0], "--max-tokens", "8"],
    "chat": ["--max-tokens", "8"],
    "cache_prompt": ["--prompt", PROBLEMS[0], "--prompt-cache-file", "cache.safetensors"],
    "benchmark": ["-p", "16", "-g", "4", "-n", "1"],
    "perplexity": [
        *("--data-path", "texts", "--num-samples", "2", "--sequence-length", "32"),
        *("--batch-size", "2"),
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_layer_holds_its_own_bits(command, exact, kv_config, tmp_path):
    (tmp_path / "texts").mkdir()
    lines = [json.dumps({"text": " ".join(PROBLEMS)}) for _ in range(4)]
    (tmp_path / "texts" / "train.jsonl").write_text("\n".join(lines))
    arguments = ["--model", exact, "--optiq-kv", kv_config, *COMMANDS[command]]
    done = subprocess.run(
        [sys.executable, "-c", probe(command, tmp_path / "notes"), *map(str, arguments)],
        cwd=tmp_path,
        input=f"{PROBLEMS[1]}\nq\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert held(tmp_path / "notes") == planned(kv_config)


def test_a_saved_prompt_goes_on_packed(exact, kv_config, run, tmp_path):
    model = ("--model", exact)
    saved, plain = tmp_path / "packed.safetensors", tmp_path / "plain.safetensors"
    start, rest = PROBLEMS[0].split(". ", 1)
    for path, options in ((saved, ("--optiq-kv", kv_config)), (plain, ())):
        run(
            *("mlx_lm.cache_prompt", *model, *options, "--prompt", start),
            *("--prompt-cache-file", path),
            check=True,
        )
    assert saved.stat().st_size < 0.6 * plain.stat().st_size
    done = run(
        *("mlx_lm.generate", *model, "--prompt-cache-file", saved, "--prompt", rest),
        *("--max-tokens", "20", "--temp", "0"),
        check=True,
    )
    assert done.stdout.strip()
    done = run(
        *("mlx_lm.generate", *model, "--prompt-cache-file", plain, "--prompt", rest),
        *("--optiq-kv", kv_config),
    )
    assert done.returncode == 2
    assert f"{plain} was saved without --optiq-kv" in done.stderr
    again = ("mlx_lm.generate", *model, "--prompt-cache-file", saved, "--prompt", rest)
    assert run(*again, "--max-tokens", "4", "--optiq-kv", kv_config, check=True).stdout.strip()
    done = run(*again, "--optiq-kv", "4")
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"{saved} was saved with another KV plan than --optiq-kv 4 (" in done.stderr
    assert "Traceback" not in done.stderr


WRONG = {
    "not-json": ("{", "is not JSON"),
    "not-a-list": ("{}", "list"),
    "out-of-range": ([{"layer_idx": 99, "bits": 4}], "99"),
    "duplicate": ([{"layer_idx": 1, "bits": 4}] * 2, "twice"),
    "bits-7": ([{"layer_idx": 1, "bits": 7}], "bits 7"),
    "group-48": ([{"layer_idx": 1, "bits": 4, "group_size": 48}], "48"),
    "negative": ([{"layer_idx": -1, "bits": 4}], "-1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_plan_ends_the_command_before_the_model_loads(name, tiny, run, tmp_path):
    content, message = WRONG[name]
    plan, folder = tmp_path / "kv.json", tmp_path / "model"
    plan.write_text(content if isinstance(content, str) else json.dumps(content))
    folder.mkdir()  # a config and no weights: to load it would fail in another way
    (folder / "config.json").write_text((tiny / "config.json").read_text())
    done = run("mlx_lm.generate", "--model", folder, "--optiq-kv", plan, "--prompt", "a")
    assert done.returncode == 2
    assert str(plan) in done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_both_ways_to_keep_keys_and_values_are_refused(tiny, run):
    arguments = ("--optiq-kv", "4", "--kv-bits", "4", "--prompt", "a")
    done = run("mlx_lm.generate", "--model", tiny, *arguments)
    assert done.returncode == 2
    assert "--optiq-kv and --kv-bits" in done.stderr
