"""A server on several ranks ends on all of them, with the reason, when one cannot go on."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
from typing import Any

import pytest
from mlx_lm.utils import load_model
from toy_adapters import write_everywhere

from .conftest import VERSION, needs_split_server
from .live_ranks import SERVE, serve_ranks

pytestmark = needs_split_server

#: Seconds that ranks may take to end, and a run that is refused with its start on a busy machine.
ALLOWED, WITH_START = 30, 90
#: Each rank works in a folder of its own, as hosts do.
APART = """
import os
os.chdir(f"rank-{os.environ['MLX_RANK']}")
from mlx_lm.COMMAND import main
main()
"""
#: Runs one command after the other.
REFUSALS = """
import importlib, json, sys, traceback
for command, *words in json.loads(sys.argv[1]):
    main = importlib.import_module(f"mlx_lm.{command}").main
    sys.argv = [command, *words]
    try:
        main()
    except (SystemExit, ValueError) as error:
        print(error, file=sys.stderr, flush=True)
"""
#: The second rank meets something that nobody foresaw while it generates.
BROKEN = """
import os
import importlib
generate = importlib.import_module("mlx_lm.generate")
step = generate.GenerationBatch._step
def broken(self):
    if os.environ["MLX_RANK"] == "1":
        raise ValueError("the disk is on fire")
    return step(self)
generate.GenerationBatch._step = broken
"""
#: The same for a request that is served alone, as those with a seed are.
BROKEN_ALONE = """
import os
from mlx_lm import server
stream = server.stream_generate
def broken(*args, **kwargs):
    for number, token in enumerate(stream(*args, **kwargs)):
        if number == 2 and os.environ["MLX_RANK"] == "1":
            raise ValueError("the disk is on fire")
        yield token
server.stream_generate = broken
"""
ENDED = "was ended, because another rank failed"


@pytest.fixture
def hosts(tmp_path, exact):
    """A folder for each rank, with a KV plan and an adapter."""
    folders = [tmp_path / f"rank-{n}" for n in range(2)]
    for folder in folders:
        folder.mkdir()
        (folder / "kv.json").write_text(json.dumps([{"layer_idx": 1, "bits": 8, "group_size": 64}]))
        write_everywhere(folder / "red", load_model(exact)[0])
    return folders


def refused(launch, hosts, command, *words) -> str:
    """What a command printed that was not to start."""
    code = APART.replace("COMMAND", command)
    done = launch(2, "-c", code, *words, cwd=hosts[0].parent, timeout=WITH_START)
    return done.stdout + done.stderr


def test_other_contents_of_a_kv_config_are_named(launch, hosts, exact):
    (hosts[1] / "kv.json").write_text(json.dumps([{"layer_idx": 1, "bits": 4, "group_size": 64}]))
    told = refused(launch, hosts, "chat", "--model", exact, "--optiq-kv", "kv.json")
    assert "the ranks do not have the same KV plan (kv_config.json)" in told
    assert told.count("error:") == 1


def test_other_weights_of_an_adapter_are_named(launch, hosts, exact):
    write_everywhere(hosts[1] / "red", load_model(exact)[0], seed=1)
    words = ("--model", exact, "--optiq-adapter", "red=red", "--port", "0")
    told = refused(launch, hosts, "server", *words)
    assert "the ranks do not have the same files of adapter red" in told
    assert told.count("error:") == 1


def test_an_adapter_that_is_damaged_everywhere_ends_the_server(launch, hosts, exact):
    for folder in hosts:
        file = folder / "red" / "adapters.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
    words = ("--model", exact, "--optiq-adapter", "red=red", "--port", "0")
    told = refused(launch, hosts, "server", *words)
    assert "adapters.safetensors cannot be read" in told


def test_what_cannot_work_is_refused_at_start(launch, exact):
    updates = ["--optiq-allow-adapter-updates", "--optiq-adapter-dir", "."]
    adapters = ["--optiq-adapter=a=red", "--optiq-adapter=b=red", "--optiq-max-adapters", "1"]
    told = {
        "mlx_lm.generate does not split a model": ["generate"],
        "takes no --draft-model in several processes": ["server", "--draft-model", "x"],
        "takes no --adapter-path in several processes": ["server", "--adapter-path", "red"],
        "--optiq-allow-adapter-updates works in one process only": ["server", *updates],
        "--optiq-max-adapters 1 would mount adapters while": ["server", *adapters],
        "does not support pipelining": ["chat", "--pipeline"],
    }
    calls = [[*words, "--model", str(exact), "--optiq-kv", "8"] for words in told.values()]
    write_everywhere(exact / "red", load_model(exact)[0])
    done = launch(2, "-c", REFUSALS, json.dumps(calls), cwd=exact, timeout=WITH_START)
    for reason in told:
        assert done.stderr.count(reason) == 1, done.stderr


@contextlib.contextmanager
def serving(tmp_path, model, *words, code=SERVE):
    """A server that generates for a client, and the processes of its ranks."""
    words = ("--model", model, "--optiq-kv", "8", *words)
    # How the ranks end is for mlx.launch to decide.
    with serve_ranks(2, tmp_path, *words, code=code, whole=True) as server:
        yield server, [int((tmp_path / f"pid-{n}").read_text()) for n in range(2)]


def ended(server) -> str:
    """What the ranks of a server say once all have ended."""
    try:
        server.process.wait(ALLOWED)
    except subprocess.TimeoutExpired:
        pytest.fail(f"it goes on:\n{server.log.read_text()}")
    return server.log.read_text()


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(("killed", "busy"), [(0, False), (1, False), (1, True)])
def test_a_killed_rank_ends_the_others(tmp_path, exact, killed, busy):
    with serving(tmp_path, exact) as (server, processes):
        server.ask("How many?")
        if busy:
            generate(server)
        os.kill(processes[killed], signal.SIGKILL)
        told = ended(server)
        # MLX before 0.32 ends the other without reading what it says of that.
        named = (f"{killed} exited with", f"{1 - killed} {ENDED}", f"{1 - killed} stops serving")
        assert any(f"rank {text}" in told for text in named), told
        assert gone(processes[1 - killed])


def generate(server) -> None:
    """Have the server generate, and come back when it does."""
    options = {"model": "default_model", "max_tokens": 2000, "stream": True}
    messages = [{"role": "user", "content": "Count."}]
    chunks = iter(server.client().chat.completions.create(messages=messages, **options))
    next(chunks)
    threading.Thread(target=lambda: list(chunks), daemon=True).start()


# Before 0.32 packed caches are served alone.
@pytest.mark.parametrize("broken", [BROKEN, BROKEN_ALONE][VERSION < (0, 32) :])
def test_an_error_on_one_rank_is_told_and_ends_all(tmp_path, exact, broken):
    seed = {"seed": 1} if broken is BROKEN_ALONE else {}
    with serving(tmp_path, exact, code=broken + SERVE) as (server, processes):
        with contextlib.suppress(Exception):
            server.ask("How many?", **seed)
        told = ended(server)
        assert "rank 1 stops serving: ValueError: the disk is on fire" in told
        assert all(map(gone, processes))


def test_a_client_that_leaves_a_request_served_alone_stops_no_rank(tmp_path, exact):
    with serving(tmp_path, exact) as (server, _):
        expected = server.ask("How many?", seed=1)
        options: Any = {"model": "default_model", "max_tokens": 60, "stream": True, "seed": 1}
        messages: Any = [{"role": "user", "content": "Count."}]
        chunks = server.client().chat.completions.create(messages=messages, **options)
        next(iter(chunks))
        chunks.close()
        assert server.ask("How many?", seed=1) == expected


def test_a_model_that_is_missing_on_one_rank_ends_all(launch, hosts, exact):
    shutil.copytree(exact, hosts[0] / "model")
    words = ("--model", "model", "--optiq-kv", "8", "--port", "0")
    told = refused(launch, hosts, "server", *words)
    assert "rank 1 stops serving" in told
