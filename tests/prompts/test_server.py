"""Live servers with prompts on disk, started anew and killed, asked by the real OpenAI client."""

import mlx_lm
import pytest
from live_server import Server, serve, settled
from toy_adapters import write_adapter

STORY = " ".join(f"There are {i} bricks in bag {i * 3 % 17}." for i in range(60))
QUESTIONS = (" How many?", " Why?", " What is in bag 3?")


def by_name(server: Server, name: str) -> tuple[str, int]:
    """What an adapter answers."""
    return ask(server, QUESTIONS[0], name)


def ask(server: Server, question: str, model: str = "default_model", **options) -> tuple[str, int]:
    """The greedy answer, and the prompt's tokens that were computed."""
    done = server.client().chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": STORY + question}],
        temperature=0,
        max_tokens=12,
        **options,
    )
    assert done.usage is not None
    assert done.usage.prompt_tokens_details is not None
    reused = done.usage.prompt_tokens_details.cached_tokens or 0
    return done.choices[0].message.content or "", done.usage.prompt_tokens - reused


@pytest.mark.parametrize("kv", [(), ("--optiq-kv", "8"), ("--optiq-kv", "4")], ids=str)
def test_a_restarted_server_finds_the_prompts(exact, tmp_path, kv):
    own = ("--model", exact, *kv)
    cached = (*own, "--optiq-prompt-cache", tmp_path / "prompts")
    with serve(tmp_path / "plain", *own) as server:
        expected = [ask(server, question)[0] for question in QUESTIONS]
    with serve(tmp_path / "first", *cached) as server:
        first = [ask(server, question) for question in QUESTIONS]
        settled(tmp_path / "prompts")
    with serve(tmp_path / "second", *cached) as server:
        again = [ask(server, question) for question in QUESTIONS]
        alone = ask(server, QUESTIONS[0], seed=1)
    assert [text for text, _ in first] == [text for text, _ in again] == expected
    assert alone[0] == expected[0]
    assert first[0][1] > 512
    assert [computed for _, computed in again] == [1] * len(QUESTIONS)
    log = (tmp_path / "second").read_text()
    assert " from disk, 1 computed" in log
    assert "bricks" not in log


def test_a_draft_model_answers_the_second_time_as_the_first(exact, tmp_path):
    own = ("--model", exact, "--draft-model", exact, "--optiq-prompt-cache", tmp_path / "prompts")
    with serve(tmp_path / "plain", "--model", exact) as server:
        expected = [ask(server, question)[0] for question in QUESTIONS]
    with serve(tmp_path / "log", *own) as server:
        assert [ask(server, question)[0] for question in QUESTIONS * 2] == expected * 2
    with serve(tmp_path / "log", *own) as server:
        assert [ask(server, question)[0] for question in QUESTIONS] == expected


def test_a_killed_server_leaves_nothing_wrong_behind(exact, tmp_path):
    own = ("--model", exact, "--optiq-prompt-cache", tmp_path / "prompts")
    with serve(tmp_path / "plain", "--model", exact) as server:
        expected = [ask(server, question)[0] for question in QUESTIONS]
    for _ in range(2):
        # Leaving the block kills it, while blocks are being written.
        with serve(tmp_path / "log", *own) as server:
            assert [ask(server, question)[0] for question in QUESTIONS] == expected
            files = list((tmp_path / "prompts").rglob("*.safetensors"))
            if files:
                files[0].write_bytes(files[0].read_bytes()[:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--optiq-prompt-cache-size", "1GB"), "needs --optiq-prompt-cache DIR"),
        (("--optiq-prompt-cache", "x", "--optiq-prompt-cache-size", "-1"), "not a size such as"),
        (("--optiq-prompt-cache", "x", "--kv-bits", "8"), "use --optiq-kv instead"),
        (("--optiq-prompt-cache", "/dev/null"), "name another folder"),
    ],
)
def test_unusable_options_are_refused_in_one_line(exact, run, options, message):
    done = run("mlx_lm.server", "--model", exact, "--port", "0", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_generate_takes_a_prompt_from_disk(exact, run, tmp_path):
    command = ("mlx_lm.generate", "--model", exact, "--prompt", STORY, "--max-tokens", "8")
    plain = run(*command, "--verbose", "False", check=True)
    cached = (*command, "--verbose", "False", "--optiq-prompt-cache", tmp_path / "prompts")
    first, again = run(*cached, check=True), run(*cached, check=True)
    assert plain.stdout == first.stdout == again.stdout
    assert "were on disk" not in first.stderr
    assert "[optiq] 677 of the prompt's 678 tokens were on disk" in again.stderr


def test_adapters_share_nothing(exact, tmp_path):
    model = mlx_lm.load(str(exact))[0]
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, model, seed=seed)
    adapters = [part for n in "ab" for part in ("--optiq-adapter", f"{n}={tmp_path / n}")]
    own = ("--model", exact, *adapters)
    names = ("default_model", "a", "b", "a+b")
    with serve(tmp_path / "plain", *own) as server:
        expected = [by_name(server, name)[0] for name in names]
    for restart in (False, True):
        with serve(tmp_path / "log", *own, "--optiq-prompt-cache", tmp_path / "prompts") as server:
            found = [by_name(server, name) for name in names]
            settled(tmp_path / "prompts", 8)
        assert [text for text, _ in found] == expected
        assert [computed == 1 for _, computed in found] == [restart] * 4
    assert len(list((tmp_path / "prompts").iterdir())) == 4
