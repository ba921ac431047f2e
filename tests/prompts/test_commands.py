"""``--optiq-prompt-cache`` in the commands that run one sequence at a time."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from .test_server import QUESTIONS, STORY


def chat(model: Path, *options: object, questions=QUESTIONS) -> subprocess.CompletedProcess[str]:
    """A chat that is left after its questions."""
    command = ("-m", "mlx_lm", "chat", "--model", model, "--max-tokens", "8", *options)
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        input="\n".join([*(STORY + question for question in questions), "q\n"]),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a chat prints, without the speeds."""
    return [line for line in done.stdout.splitlines() if "tok/s" not in line]


@pytest.mark.parametrize("kv", [(), ("--optiq-kv", "4")], ids=str)
def test_a_chat_goes_on_from_disk(exact, tmp_path, kv):
    cached = (*kv, "--optiq-prompt-cache", tmp_path / "prompts")
    plain, first, again = chat(exact, *kv), chat(exact, *cached), chat(exact, *cached)
    assert said(plain) == said(first) == said(again)
    assert "were on disk" not in first.stderr
    assert (
        again.stderr.count("[optiq] 680 of the prompt's 681 tokens") == 1
    )  # the chat's first turn


def test_a_conversation_is_kept_whole(exact, tmp_path):
    cached = ("--optiq-prompt-cache", tmp_path / "prompts")
    chat(exact, *cached)
    files = len(list((tmp_path / "prompts").rglob("*.safetensors")))
    assert files > 4  # three turns of two blocks and more, one behind another
    chat(exact, *cached)
    assert len(list((tmp_path / "prompts").rglob("*.safetensors"))) == files


def test_a_prompt_that_is_cached_comes_from_disk(exact, run, tmp_path):
    saved = [tmp_path / f"{name}.safetensors" for name in ("plain", "first", "again")]
    command = ("mlx_lm.cache_prompt", "--model", exact, "--prompt", STORY)
    cached = ("--optiq-prompt-cache", tmp_path / "prompts")
    run(*command, "--prompt-cache-file", saved[0], check=True)
    first = run(*command, *cached, "--prompt-cache-file", saved[1], check=True)
    again = run(*command, *cached, "--prompt-cache-file", saved[2], check=True)
    assert "were on disk" not in first.stderr
    assert "[optiq] 674 of the prompt's 675 tokens" in again.stderr
    plain, *others = (load_file(path).keys() for path in saved)
    assert [plain] * 2 == others
    asked = ("mlx_lm.generate", "--model", exact, "--prompt", QUESTIONS[0], "--max-tokens", "8")
    answers = {
        run(*asked, "--prompt-cache-file", path, "--verbose", "False", check=True).stdout
        for path in saved
    }
    assert len(answers) == 1
    # What cache_prompt kept, generate finds.
    done = run("mlx_lm.generate", "--model", exact, "--prompt", STORY, *cached, check=True)
    assert "[optiq] 675 of the prompt's 678 tokens" in done.stderr


@pytest.mark.parametrize("command", ["generate", "cache_prompt"])
def test_stock_quantization_is_refused(exact, run, tmp_path, command):
    file = ("--prompt-cache-file", tmp_path / "saved") if command == "cache_prompt" else ()
    done = run(
        *(f"mlx_lm.{command}", "--model", exact, "--prompt", "x", *file),
        *("--kv-bits", "8", "--optiq-prompt-cache", tmp_path / "prompts"),
    )
    assert done.returncode == 2
    assert "does not keep what --kv-bits quantizes: use --optiq-kv instead" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "prompts").exists()


def test_a_draft_model_of_a_command_is_refused(exact, run, tmp_path):
    done = run(
        *("mlx_lm.generate", "--model", exact, "--draft-model", exact, "--prompt", "x"),
        *("--optiq-prompt-cache", tmp_path / "prompts"),
    )
    assert done.returncode == 2
    assert "with --draft-model works in mlx_lm.server only: leave one out" in done.stderr
    assert "Traceback" not in done.stderr
