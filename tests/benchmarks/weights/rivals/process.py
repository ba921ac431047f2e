"""Time and peak memory of a child process, and how busy the machine was with others meanwhile.

The process that calls this must stay small: on Linux a child's peak memory starts at its parent's.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MEASURED = Path(__file__).parent / "measured.py"

#: Children that are running, for `stop`.
_running: set[subprocess.Popen] = set()

#: Cores that others may keep busy before a time counts as contended.
QUIET = 0.25


@dataclass(frozen=True)
class Cost:
    """What one child took.

    Attributes:
        seconds: Wall time.
        processor: Processor seconds, which others' work changes little.
        resident_gib: Peak resident memory of the process.
        mlx_gib: Peak of MLX's allocator in it; None if it ended before it could tell.
        others: Cores that other programs kept busy on average; None where that is unknown.
        failure: The last line that it wrote before it failed; None if it did not.
    """

    seconds: float
    processor: float
    resident_gib: float
    mlx_gib: float | None
    others: float | None
    failure: str | None = None

    @property
    def contended(self) -> bool:
        """Whether others slowed it down."""
        return self.others is not None and self.others > QUIET


def measure(
    python: str | Path,
    *command: str,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
    log: Path | None = None,
) -> Cost:
    """Run a Python program to its end.

    Args:
        python: The interpreter.
        command: ``-m MODULE`` or a script, and its arguments.
        environment: Added to this process's; an empty value removes a variable.
        folder: Working folder.
        log: Where to append what it prints; None discards all but a failure's last line.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report, output = Path(scratch) / "report.json", Path(scratch) / "output"
        started, busy = time.perf_counter(), busy_seconds()
        with output.open("wb") as stream:
            child = subprocess.Popen(
                [str(python), str(MEASURED), str(report), *command],
                env=surroundings(environment or {}),
                cwd=folder,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            _running.add(child)
            _, status, usage = os.wait4(child.pid, 0)
            _running.discard(child)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        peak = json.loads(report.read_text())["mlx_peak_bytes"] if report.exists() else None
        text = output.read_text(errors="replace")
    if log is not None:
        with log.open("a") as stream:
            stream.write(f"$ {' '.join(command)}\n{text}\n")
    processor = usage.ru_utime + usage.ru_stime
    return Cost(
        seconds=seconds,
        processor=processor,
        resident_gib=resident_gib(usage),
        mlx_gib=None if peak is None else peak / 2**30,
        others=others(busy, busy_seconds(), processor, seconds),
        failure=last_line(text) if child.returncode else None,
    )


def surroundings(added: dict[str, str]) -> dict[str, str]:
    """This process's environment with some variables; an empty value removes one."""
    return {name: value for name, value in {**os.environ, **added}.items() if value}


def stop() -> None:
    """End the children that are running, in whatever thread they were started."""
    for child in list(_running):
        os.kill(child.pid, signal.SIGTERM)


def resident_gib(usage: resource.struct_rusage) -> float:
    """Peak resident memory; the system counts in KiB on Linux and in bytes on macOS."""
    return usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def busy_seconds() -> float | None:
    """Processor seconds that all programs have used since the machine started; Linux only."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, interrupts, soft = (int(field) for field in fields[:7])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def others(before: float | None, after: float | None, own: float, seconds: float) -> float | None:
    """Cores that others kept busy: all processor time less our child's, over the wall time."""
    if before is None or after is None:
        return None
    return max(after - before - own, 0.0) / seconds


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
