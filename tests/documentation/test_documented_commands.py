"""Every command and snippet of the README and of docs/ runs, on the embedded tiny model.

A page runs from its top to its end, in a folder of its own. A block that is marked in its page as
``parsed only``, with a reason, goes through the commands' own parsers alone.
"""

import io
import json
import urllib.request
from pathlib import Path

import mlx_lm
import pytest
from documented import ROOT, Block, blocks
from live_server import serve
from toy_adapters import write_adapter

from mlx_optiq_hooks.engine import flags

pytestmark = pytest.mark.newest

BLOCKS = blocks()
#: Models of the Hub that the pages name; the tiny model takes their place.
HUB = ("Qwen/Qwen3-4B", "mlx-community/Qwen3-4B-4bit", "mlx-community/Qwen3-8B-4bit")
CALIBRATION = ("--optiq-calibration", "text.jsonl")
#: The folder that a page names and another page converts -> how it is made here.
CONVERTED = {
    "qwen3-4b-3.5": ("--optiq-budget", "3.5", "--optiq-effort", "plan", *CALIBRATION),
    "qwen3-4b": ("-q",),
}
#: Page -> adapters that it names and no page trains.
ADAPTERS = {"adapters": ("adapters/sql", "adapters/tone"), "lora": ("plain-adapter",)}
#: Option -> the value that it gets here, where a page's would take minutes.
SHORT = {"--iters": "2"}
#: What only a marked block may run, since the tests do not install anything.
OUTSIDE = ("apt-get", "export", ".venv/bin/nox")


def pages(*languages: str) -> list[str]:
    """The pages that have blocks to run in one of these languages."""
    return list(dict.fromkeys(b.page for b in BLOCKS if b.language in languages and not b.reason))


def local(text: str, tiny: Path) -> str:
    """Text in which the Hub's models are the tiny one."""
    for name in sorted(HUB, key=len, reverse=True):
        text = text.replace(name, str(tiny))
    return text


@pytest.fixture(scope="module")
def measurements(tmp_path_factory):
    """A folder of measurements that the pages share."""
    return tmp_path_factory.mktemp("measurements")


@pytest.fixture
def folder(command, tiny, measurements, monkeypatch):
    """The working folder, with the files that pages name."""
    monkeypatch.setenv("MLX_OPTIQ_EXT_CACHE", str(measurements))
    here = Path.cwd()
    (here / "tests").symlink_to(ROOT / "tests")
    lines = (ROOT / "tests/data/calibration.jsonl").read_text().splitlines(keepends=True)
    (here / "text.jsonl").write_text("".join(lines[:40]))
    (here / "data").mkdir()
    for name in ("train", "valid"):
        pairs = map(json.loads, lines[:8])
        rows = ({"prompt": each["question"], "completion": each["answer"]} for each in pairs)
        (here / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return here


def shortened(words: list[str]) -> list[str]:
    """A command's words, with the values of `SHORT`."""
    return [SHORT.get(before, word) for before, word in zip(["", *words], words, strict=False)]


def needs(page: str, words: list[str], here: Path, command, tiny: Path) -> None:
    """Make what other pages would have made before a command runs."""
    for seed, name in enumerate(ADAPTERS.get(page, ())):
        if not (here / name).exists():
            write_adapter(here / name, mlx_lm.load(str(tiny))[0], seed=seed)
    for name in set(CONVERTED).intersection(words):
        output = words[words.index(name) - 1] == "--mlx-path"
        if not output and not (here / name).exists():
            made = command("convert", "--hf-path", tiny, "--mlx-path", name, *CONVERTED[name])
            assert made.status == 0, made.err


def ask(words: list[str], url: str) -> None:
    """What ``curl`` does, of the server that runs."""
    address = words[1].replace("localhost:8080", url.removeprefix("http://"))
    data = words[words.index("-d") + 1].encode() if "-d" in words else None
    request = urllib.request.Request(
        f"http://{address}", data, {"Content-Type": "application/json"} if data else {}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert json.load(answer)


@pytest.mark.parametrize("page", pages(""))
def test_a_page_runs_from_its_top_to_its_end(page, folder, command, tiny, monkeypatch):
    for block in (b for b in BLOCKS if b.page == page and not b.language and not b.reason):
        run_block(block, folder, command, tiny, monkeypatch)


def run_block(block: Block, folder: Path, command, tiny: Path, monkeypatch) -> None:
    """Run a block's commands; a server runs until the next command that is not for it."""
    commands = [[local(word, tiny) for word in words] for words in block.commands()]
    while commands:
        program, *words = commands.pop(0)
        if words[:2] == ["-m", "venv"] or program.endswith("pip"):
            continue  # the environment of the tests has it
        name = Path(program).name.removeprefix("mlx_lm.")
        assert Path(program).name == f"mlx_lm.{name}", f"{block}: {program} cannot be run here"
        needs(block.page, words, folder, command, tiny)
        if name == "server":
            port = words.index("--port")
            requests = [each for each in commands if each[0] == "curl"]
            with serve(folder / "server.log", *words[:port], *words[port + 2 :]) as server:
                for request in requests:
                    ask(request, server.url)
            commands = [each for each in commands if each[0] != "curl"]
            continue
        monkeypatch.setattr("sys.stdin", io.StringIO("What is 5 + 4?\nq\n"))
        done = command(name, *shortened(words))
        assert done.status == 0, f"{block}: {done.err}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.reason and not b.language], ids=str)
def test_what_is_not_run_is_a_command_line_that_the_parsers_take(block, command, monkeypatch):
    assert len(block.reason.split()) > 1
    monkeypatch.setattr(flags, "check", lambda *_: lambda: None)  # parsed, and nothing runs
    for words in block.commands():
        if words[0] == "mlx.launch":
            words = words[words.index("--") + 1 :]
        if words[0] in OUTSIDE or words[:3] == ["python3", "-m", "venv"] or "pip" in words[0]:
            continue
        assert words[0].startswith("mlx_lm.")
        assert any(word.startswith("--optiq-") for word in words), "stock would run it"
        done = command(words[0].removeprefix("mlx_lm."), *words[1:])
        assert (done.status, done.err) == (0, "")


@pytest.mark.parametrize("page", pages("python", "json"))
def test_a_pages_snippets_run(page, folder, command, tiny):
    needs(page, [], folder, command, tiny)
    for block in (b for b in BLOCKS if b.page == page and not b.reason):
        if block.language == "python":
            exec(compile(local(block.text, tiny), str(block), "exec"), {})
        elif block.language == "json":
            json.loads(block.text)


def test_blocks_are_commands_snippets_or_plain_text():
    assert {block.language for block in BLOCKS} == {"", "python", "json", "text"}
    for block in BLOCKS:
        if block.reason and block.language == "python":
            compile(block.text, str(block), "exec")
    assert len([b for b in BLOCKS if not b.reason]) > len([b for b in BLOCKS if b.reason])
