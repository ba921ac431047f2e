"""Damages valid files in 20,000 ways for each reader of untrusted files, and watches what it does.

    python tests/benchmarks/fuzz_readers.py [--count 20000] [--readers "plan,YOLO .pt"] [--jobs 2]

Each reader runs in a process of its own with 512 MB of address space beyond what Python and MLX
take, and 2 seconds of processor time for each file. A file is accepted, or refused with an
OptiqError. Anything else is a failure, whose file is kept: another exception, a crash, more memory
or time, or an attempt to run or import anything, or to change files elsewhere. Exit status 1 if
there is one.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SECONDS, MEGABYTES = 2.0, 512

#: What Python's audit hooks call running something.
RUNNING = (
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "pty.spawn"),
    *("exec", "compile", "import", "pickle.find_class", "marshal.loads", "ctypes.dlopen"),
    *("socket.connect", "webbrowser.open"),
)
#: What may happen in the reader's own folder only.
CHANGING = ("os.remove", "os.rename", "os.rmdir", "os.chmod", "os.symlink", "shutil.rmtree")
#: Where a unit of ru_maxrss is one byte.
UNIT = 1 << 20 if sys.platform == "darwin" else 1 << 10


@dataclass
class Outcome:
    """What one reader did.

    Attributes:
        mutations: Files that it was given.
        accepted: Files that it read.
        refused: Files that it refused with an OptiqError.
        seconds: Processor time of the slowest one.
        megabytes: Resident memory at its highest, beyond that before the first file.
        failures: Number of a mutation and what happened.
    """

    mutations: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    megabytes: float = 0.0
    failures: list[tuple[int, str]] = field(default_factory=list)

    def join(self, other: "Outcome") -> None:
        """Add what the next process of the same reader did."""
        self.mutations += other.mutations
        self.accepted += other.accepted
        self.refused += other.refused
        self.seconds = max(self.seconds, other.seconds)
        self.megabytes = max(self.megabytes, other.megabytes)
        self.failures += other.failures


def mutated(name: str, contents: dict[str, bytes], number: int) -> tuple[str, bytes]:
    """The damaged file of a reader's mutation: its name and content."""
    from fuzzing.mutations import MUTATIONS

    draw = random.Random(f"{name} {number}")
    target = draw.choice(sorted(contents))
    return target, MUTATIONS[Path(target).suffix](draw, contents[target])


def work(names: list[str], first: int, last: int, progress: Path) -> None:
    """Run readers on their mutations in this process, the first one from ``first`` on.

    Prints an outcome as JSON for each reader that is done.
    """
    from fuzzing.readers import all_readers, broken_readers

    scratch = Path(tempfile.mkdtemp(dir=progress.parent))
    known = {**all_readers(scratch), **broken_readers()}
    shutil.rmtree(scratch)
    folder = progress.parent / "files"
    for name in names:
        _warm(name, known[name], folder)
    ran: list[str] = []
    reading = [False]

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        beside = event in CHANGING and not str(arguments[0]).startswith(str(folder))
        if reading[0] and (event in RUNNING or beside):
            ran.append(f"{event} {arguments!r:.100}")

    sys.addaudithook(audit)
    limit(MEGABYTES)
    for name in names:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome = Outcome()
        _restore(known[name], folder)
        for number in range(first, last):
            progress.write_text(f"{name}\n{number}")
            _one(name, known[name], number, folder, outcome, reading)
            if ran:
                outcome.failures.append((number, f"ran {ran[0]}"))
                ran.clear()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome.megabytes = (after - before) * UNIT / (1 << 20)
        print(json.dumps([name, asdict(outcome)]), flush=True)
        first = 0


def _warm(name: str, reader: Any, folder: Path) -> None:
    """Read whole files and some damaged ones, so that what is imported late is imported."""
    from mlx_optiq_ext.errors import OptiqError

    _restore(reader, folder)
    reader.read(folder)
    for number in range(-reader.warm, 0):
        _restore(reader, folder)
        target, content = mutated(name, reader.files, number)
        (folder / target).write_bytes(content)
        with suppress(OptiqError):
            reader.read(folder)


def _restore(reader: Any, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file, content in reader.files.items():
        (folder / file).write_bytes(content)


def _one(
    name: str, reader: Any, number: int, folder: Path, outcome: Outcome, reading: list[bool]
) -> None:
    from mlx_optiq_ext.errors import OptiqError

    target, content = mutated(name, reader.files, number)
    (folder / target).write_bytes(content)
    begin = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)
    reading[0] = True
    try:
        reader.read(folder)
        outcome.accepted += 1
    except OptiqError as error:
        outcome.refused += 1
        if len(str(error)) > 2000 or "\n" in str(error):
            outcome.failures.append((number, f"a message of {len(str(error))} characters"))
    except BaseException as error:
        outcome.failures.append((number, f"{type(error).__name__}: {error!s:.200}"))
    reading[0] = False
    signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - begin
    outcome.seconds = max(outcome.seconds, seconds)
    outcome.mutations += 1
    if seconds > SECONDS:
        outcome.failures.append((number, f"{seconds:.1f} s"))
    if {path.name for path in folder.iterdir()} == set(reader.files):
        (folder / target).write_bytes(reader.files[target])
    else:
        _restore(reader, folder)


def limit(megabytes: int) -> None:
    """Let this process have so much address space beyond what it has."""
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        pages = int(statistics.read_text().split()[0])
        whole = pages * resource.getpagesize() + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (whole, whole))


def watch(names: Sequence[str], count: int, kept: Path | None = None) -> dict[str, Outcome]:
    """Run readers on ``count`` mutations each, in a new process after each crash."""
    found = {name: Outcome() for name in names}
    left, first = list(names), 0
    with tempfile.TemporaryDirectory(prefix="mlx-optiq-ext-fuzz-") as scratch:
        progress = Path(scratch) / "progress"
        while left:
            command = [sys.executable, __file__, "--worker", ",".join(left), str(first), str(count)]
            done = subprocess.run(
                [*command, str(progress)], capture_output=True, text=True, cwd=scratch
            )
            for line in done.stdout.splitlines():
                name, outcome = json.loads(line)
                found[name].join(Outcome(**outcome))
            if done.returncode == 0:
                break
            if not progress.exists():
                raise RuntimeError(f"{', '.join(left)}: {done.stderr[-2000:]}")
            name, number = progress.read_text().split("\n")
            start = first if name == left[0] else 0
            found[name].mutations += int(number) + 1 - start
            ends = {-signal.SIGPROF: "hangs", -signal.SIGKILL: "was killed"}
            why = ends.get(done.returncode, f"crashes ({done.returncode}) {done.stderr[-300:]}")
            found[name].failures.append((int(number), why))
            left, first = left[left.index(name) :], int(number) + 1
            progress.unlink()
            if first == count:
                left, first = left[1:], 0
        for name in names if kept else ():
            assert kept is not None
            _keep(name, found[name], kept, Path(scratch))
    return found


def _keep(name: str, outcome: Outcome, kept: Path, scratch: Path) -> None:
    from fuzzing.readers import all_readers

    if not outcome.failures:
        return
    contents = all_readers(scratch)[name].files
    for number, _ in outcome.failures[:50]:
        target, content = mutated(name, contents, number)
        kept.mkdir(parents=True, exist_ok=True)
        (kept / f"{name.replace(' ', '-')}-{number}-{target}").write_bytes(content)


def table(found: dict[str, Outcome]) -> str:
    """The outcomes as Markdown."""
    lines = [
        "| reader | mutations | accepted | refused | failures | worst s | worst MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, o in found.items():
        lines.append(
            f"| {name} | {o.mutations:,} | {o.accepted:,} | {o.refused:,} | {len(o.failures)} | "
            f"{o.seconds:.2f} | {o.megabytes:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run all readers and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--readers", help="names, with commas between; all by default")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for files that a reader fails on")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        names, first, last, progress = options.worker
        work(names.split(","), int(first), int(last), Path(progress))
        return 0
    from fuzzing.readers import all_readers

    with tempfile.TemporaryDirectory() as scratch:
        names = list(all_readers(Path(scratch)))
    names = options.readers.split(",") if options.readers else names
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = pool.map(lambda name: watch([name], options.count, options.keep), names)
        found: dict[str, Outcome] = {}
        for outcome in outcomes:
            found |= outcome
            print(outcome, file=sys.stderr, flush=True)
    print(table(found))
    return int(any(outcome.failures for outcome in found.values()))


if __name__ == "__main__":
    sys.exit(main())
