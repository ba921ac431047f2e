"""Kills conversions of tiny-qwen3 at random moments and runs them again.

    python tests/benchmarks/weights/killed.py [--moments 30] [--seed 0] [--out results/killed.jsonl]

A third of the moments each goes to plain, refined and streamed conversions. A moment is a number of
seconds of processor time, so that it does not depend on what else runs. Linux only.

After SIGKILL the same command runs to its end: its files must be those of a conversion that nobody
disturbed, byte by byte, and nothing else may lie beside them or in the folder of measurements.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

DATA = Path(__file__).parents[2] / "data"

#: Kind -> further words of the command, and switches.
KINDS: Mapping[str, tuple[tuple[str, ...], Mapping[str, str]]] = {
    "plain": (("--optiq-effort", "plan"), {}),
    "refined": (("--optiq-effort", "refine"), {}),
    "streamed": (("--optiq-effort", "plan"), {"MLX_OPTIQ_EXT_STREAM": "1"}),
}


@dataclass(frozen=True)
class Row:
    """One moment.

    Attributes:
        kind: Of the conversion.
        seconds: Processor time after which it was killed.
        of: Processor time that the undisturbed conversion took.
        killed: Whether it was still running.
        beside: What the kill left beside the output.
        status: Exit status of the second run; None if the first one had ended already.
        same: Whether the files are those of the undisturbed conversion.
        left: What lies around after the second run.
    """

    kind: str
    seconds: float
    of: float
    killed: bool
    beside: list[str]
    status: int | None
    same: bool
    left: list[str]

    @property
    def right(self) -> bool:
        """Whether it went as it should."""
        return self.same and not self.left and self.status in (0, None)


def start(kind: str, folder: Path, text: Path) -> subprocess.Popen[bytes]:
    """Start a conversion into ``folder/place/out``."""
    more, switches = KINDS[kind]
    words = ["--hf-path", str(DATA / "tiny-qwen3"), "--mlx-path", str(folder / "place" / "out")]
    words += ["--optiq-budget", "5", "--optiq-calibration", str(text), *more]
    words += ["--optiq-bits", "4,6", "--optiq-group-sizes", "64"]
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_lm", "convert", *words],
        env={**os.environ, **switches, "MLX_OPTIQ_EXT_CACHE": str(folder / "cache")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def digests(folder: Path) -> dict[str, str]:
    """Each file's hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def around(folder: Path) -> list[str]:
    """What is neither the output nor a file of measurements."""
    found = [path for path in (folder / "place").glob("*") if path.name != "out"]
    found += [
        path
        for path in (folder / "cache").rglob("*")
        if (path.is_file() and path.suffix != ".jsonl") or path.name.startswith("spill.")
    ]
    return sorted(str(path.relative_to(folder)) for path in found)


def processor(pid: int) -> float:
    """Seconds of processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def undisturbed(kind: str, holder: Path, text: Path) -> tuple[dict[str, str], float]:
    """The files of a conversion, and its processor time."""
    folder = holder / f"reference {kind}"
    _, status, usage = os.wait4(start(kind, folder, text).pid, 0)
    assert status == 0, "the conversion fails by itself"
    return digests(folder / "place" / "out"), usage.ru_utime + usage.ru_stime


def killed(kind: str, seconds: float, of: float, folder: Path, text: Path, expected) -> Row:
    """Kill a conversion, run it again, and look at what is there."""
    process = start(kind, folder, text)
    while process.poll() is None:
        if processor(process.pid) >= seconds:
            process.kill()
            process.wait()
        time.sleep(0.002)
    ended = (folder / "place" / "out").exists()
    beside = around(folder)
    status = None if ended else start(kind, folder, text).wait()
    same = digests(folder / "place" / "out") == expected
    alive = process.returncode < 0
    return Row(kind, round(seconds, 2), round(of, 2), alive, beside, status, same, around(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    draw, rows = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as name:
        holder = Path(name)
        text = holder / "text.txt"
        lines = (DATA / "calibration.jsonl").read_text().splitlines()[:30]
        text.write_text("\n".join(json.loads(line)["question"] for line in lines))
        expected = {kind: undisturbed(kind, holder, text) for kind in KINDS}
        for number in range(args.moments):
            kind = list(KINDS)[number % len(KINDS)]
            files, of = expected[kind]
            folder = holder / str(number)
            rows.append(killed(kind, draw.uniform(0, of), of, folder, text, files))
            shutil.rmtree(folder)
            line = json.dumps({**asdict(rows[-1]), "right": rows[-1].right})
            print(line, flush=True)
            if args.out is not None:
                with args.out.open("a") as stream:
                    stream.write(line + "\n")
    right = sum(row.right for row in rows)
    print(f"{right} of {len(rows)} right; {sum(row.killed for row in rows)} were still running")
    return int(right < len(rows))


if __name__ == "__main__":
    sys.exit(main())
