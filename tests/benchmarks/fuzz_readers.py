"""Damages valid files in 20,000 ways for each reader of untrusted files, and watches what it does.

    python tests/benchmarks/fuzz_readers.py [--count 20000] [--readers "plan,YOLO .pt"] [--jobs 2]

Each reader runs in a process of its own with 512 MB of address space beyond what Python and MLX
take, and 2 seconds of processor time for each file. A file is accepted, or refused with an
OptiqError. Anything else is a failure, whose file is kept: another exception, a crash, more memory
or time, or an attempt to run, import or open for writing anything. Exit status 1 if there is one.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SECONDS, MEGABYTES = 2.0, 512

#: What Python's audit hooks call running something.
RUNNING = (
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "pty.spawn"),
    *("exec", "compile", "import", "pickle.find_class", "marshal.loads", "ctypes.dlopen"),
    *("socket.connect", "os.remove", "shutil.rmtree", "webbrowser.open"),
)
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


def work(name: str, first: int, last: int, progress: Path) -> None:
    """Run a reader on some mutations in this process, and print the outcome as JSON."""
    from fuzzing.readers import all_readers

    from mlx_optiq_ext.errors import OptiqError

    scratch = Path(tempfile.mkdtemp(dir=progress.parent))
    reader = all_readers(scratch)[name]
    shutil.rmtree(scratch)
    folder, outcome, ran = progress.parent / "files", Outcome(), []
    reading = False

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if reading and event in RUNNING:
            ran.append(f"{event} {arguments!r:.100}")

    def restore() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file, content in reader.files.items():
            (folder / file).write_bytes(content)

    restore()
    reader.read(folder)  # the whole files are read, and what is imported late is imported
    for number in range(-300, 0):
        restore()
        target, content = mutated(name, reader.files, number)
        (folder / target).write_bytes(content)
        try:
            reader.read(folder)
        except OptiqError:
            pass
        except Exception:
            break  # it is found below, or is a reason to look
    sys.addaudithook(audit)
    limit(MEGABYTES)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    restore()
    for number in range(first, last):
        progress.write_text(str(number))
        target, content = mutated(name, reader.files, number)
        (folder / target).write_bytes(content)
        begin = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)
        reading = True
        try:
            reader.read(folder)
            outcome.accepted += 1
        except OptiqError as error:
            outcome.refused += 1
            if len(str(error)) > 2000 or "\n" in str(error):
                outcome.failures.append((number, f"a message of {len(str(error))} characters"))
        except BaseException as error:
            outcome.failures.append((number, f"{type(error).__name__}: {error!s:.200}"))
        reading = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.process_time() - begin
        outcome.seconds = max(outcome.seconds, seconds)
        outcome.mutations += 1
        if ran:
            outcome.failures.append((number, f"ran {ran[0]}"))
            ran.clear()
        if seconds > SECONDS:
            outcome.failures.append((number, f"{seconds:.1f} s"))
        if {path.name for path in folder.iterdir()} != set(reader.files):
            restore()
        else:
            (folder / target).write_bytes(reader.files[target])
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome.megabytes = (after - before) * UNIT / (1 << 20)
    print(json.dumps(asdict(outcome)))


def limit(megabytes: int) -> None:
    """Let this process have so much address space beyond what it has."""
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        pages = int(statistics.read_text().split()[0])
        whole = pages * resource.getpagesize() + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (whole, whole))


def watch(name: str, count: int, kept: Path | None = None) -> Outcome:
    """Run a reader on ``count`` mutations, in a new process after each crash."""
    total, first = Outcome(), 0
    with tempfile.TemporaryDirectory(prefix="mlx-optiq-ext-fuzz-") as scratch:
        progress = Path(scratch) / "progress"
        while first < count:
            command = [sys.executable, __file__, "--worker", name, str(first), str(count)]
            done = subprocess.run(
                [*command, str(progress)], capture_output=True, text=True, cwd=scratch
            )
            if done.returncode == 0:
                total.join(Outcome(**json.loads(done.stdout.splitlines()[-1])))
                break
            if not progress.exists():
                raise RuntimeError(f"{name} does not start: {done.stderr[-2000:]}")
            number = int(progress.read_text())
            total.mutations += number + 1 - first
            ends = {-signal.SIGPROF: "hangs", -signal.SIGKILL: "was killed"}
            why = ends.get(done.returncode, f"crashes ({done.returncode}) {done.stderr[-300:]}")
            total.failures.append((number, why))
            first = number + 1
        if kept is not None and total.failures:
            _keep(name, total, kept, Path(scratch))
    return total


def _keep(name: str, outcome: Outcome, kept: Path, scratch: Path) -> None:
    from fuzzing.readers import all_readers

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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--readers", help="names, with commas between; all by default")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for files that a reader fails on")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, first, last, progress = options.worker
        work(name, int(first), int(last), Path(progress))
        return 0
    from fuzzing.readers import all_readers

    with tempfile.TemporaryDirectory() as scratch:
        names = list(all_readers(Path(scratch)))
    names = options.readers.split(",") if options.readers else names
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = pool.map(lambda name: watch(name, options.count, options.keep), names)
        found = {}
        for name, outcome in zip(names, outcomes, strict=True):
            found[name] = outcome
            print(f"{name}: {outcome}", file=sys.stderr, flush=True)
    print(table(found))
    return int(any(outcome.failures for outcome in found.values()))


if __name__ == "__main__":
    sys.exit(main())
