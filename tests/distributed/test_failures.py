"""A rank that dies, disagrees or is not there ends the run on every rank, with the reason."""

import signal
import subprocess
import sys
import time

import pytest

#: Seconds that a run may take to end.
ALLOWED = 30

START = """
import os, signal, sys, time
import mlx.core as mx
from mlx_optiq_ext import distributed
from mlx_optiq_ext.errors import InputError
rank = distributed.rank()
"""

TOLD = """
def tell():
    try:
        with distributed.together():
            run()
    except Exception as error:
        sys.stdout.write(f"\\n{rank}: {type(error).__name__}: {error}\\n")
        sys.stdout.flush()
        raise SystemExit(2)
tell()
"""


OTHER = "from mlx_optiq_ext import _version; _version.__version__ = f'9.{rank}'"


def outcomes(done, count) -> list[str]:
    """What each rank that lived to tell raised."""
    lines = done.stdout.splitlines()
    return [next((x for x in lines if x.startswith(f"{n}: ")), "") for n in range(count)]


def was_ended(done, rank) -> bool:
    """Whether a rank said why it left; the launchers before MLX 0.32 drop that, not its status."""
    said = f"rank {rank} was ended, because another rank failed" in done.stderr
    return said or f"rank {rank} exited with code 143" in done.stderr


def ended(launch, count, body, **settings):
    started = time.monotonic()
    done = launch(count, "-c", START + body, **settings)
    assert time.monotonic() - started < ALLOWED
    return done


@pytest.mark.parametrize(
    ("fact", "named"),
    [(OTHER, "mlx-optiq-ext: 9.0 on rank 0, 9.1 on rank 1"), ("", "kv_config: [0] on rank 0, [1]")],
)
def test_another_version_or_configuration_is_named_on_every_rank(launch, fact, named):
    body = f"{fact}\ndef run(): distributed.agree(kv_config=[rank])\n"
    found = outcomes(ended(launch, 2, body + TOLD), 2)
    assert all("Mismatch" in line and named in line for line in found), found


def test_ranks_of_one_mind_go_on_and_the_odd_one_is_named(launch):
    body = "def run(): distributed.agree(config=rank == 2)\n"
    found = outcomes(ended(launch, 4, body + TOLD), 4)
    assert all("config: False on ranks 0, 1 and 3, True on rank 2" in line for line in found), found


def test_an_error_on_one_rank_is_raised_on_all_at_their_next_exchange(launch):
    body = """
def run():
    if rank == 1:
        raise InputError("model.safetensors is missing")
    distributed.summed(mx.ones((4,)))
"""
    found = outcomes(ended(launch, 2, body + TOLD), 2)
    assert found == [f"{n}: Failed: on rank 1: model.safetensors is missing" for n in range(2)]


def test_the_same_error_on_all_ranks_is_said_as_it_is(launch):
    body = "def run(): raise InputError('no such file')\n"
    found = outcomes(ended(launch, 2, body + TOLD), 2)
    assert found == [f"{n}: Failed: no such file" for n in range(2)]


def test_a_fault_keeps_its_own_type_where_it_happened(launch):
    body = """
def run():
    if rank == 1:
        [][0]
    distributed.total(1.0)
"""
    first, second = outcomes(ended(launch, 2, body + TOLD), 2)
    assert first == "0: Failed: on rank 1: IndexError: list index out of range"
    assert second == "1: IndexError: list index out of range"


def test_a_killed_rank_ends_the_others_with_a_reason(launch):
    body = """
def run():
    distributed.agree()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        distributed.total(1.0)
"""
    done = ended(launch, 3, body + TOLD)
    told = done.stdout + done.stderr
    for rank in (0, 2):
        assert f"rank {rank} lost another rank" in told or was_ended(done, rank), told


def test_a_rank_killed_while_the_others_compute_ends_them_too(launch):
    body = """
def run():
    distributed.agree()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""
    done = ended(launch, 2, body + TOLD)
    assert was_ended(done, 0), done.stderr


def test_a_rank_that_does_not_answer_is_not_waited_for(launch):
    body = """
def run():
    if rank == 1:
        time.sleep(60)
    distributed.agree(2.0)
"""
    done = ended(launch, 2, body + TOLD)
    assert "rank 0 got no answer within 2 s" in done.stderr


def test_a_rank_that_never_starts_is_not_waited_for(launch):
    body = """
import os, time
from mlx_optiq_ext.distributed import group
if os.environ["MLX_RANK"] == "1":
    time.sleep(60)
group(2.0)
"""
    started = time.monotonic()
    done = launch(2, "-c", body)
    assert time.monotonic() - started < ALLOWED
    assert "the other ranks did not start within 2 s" in done.stderr


def test_a_rank_that_runs_something_else_is_found_out(launch):
    body = """
def run():
    if rank == 1:
        mx.eval(mx.distributed.all_gather(mx.zeros((1, 1024), mx.uint8), stream=mx.cpu))
        time.sleep(60)
    distributed.agree()
"""
    done = ended(launch, 2, body + TOLD)
    assert "rank 1 runs something else than rank 0" in done.stdout


TERMINATED = """
import sys, threading
from mlx_optiq_ext.distributed.watch import explain_termination
explain_termination("another rank failed")
print("ready", flush=True)
threading.Event().wait()
"""
OVERDUE = """
import time
from mlx_optiq_ext.distributed.watch import guarded
print("ready", flush=True)
with guarded(0.5, "the others do not answer"):
    time.sleep(60)
"""


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize(
    ("program", "message", "status"),
    [
        (TERMINATED, "another rank failed", 128 + signal.SIGTERM),
        (OVERDUE, "the others do not answer", -signal.SIGKILL),
    ],
)
def test_a_process_ends_though_nobody_reads_its_error(program, message, status, read):
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        try:
            assert running.stdout.readline() == "ready\n"
            if not read:
                running.stderr.close()
            if program is TERMINATED:
                running.terminate()
            assert running.wait(20) == status
            assert not read or message in running.stderr.read()
        finally:
            running.kill()
