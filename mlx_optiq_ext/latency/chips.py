"""Chips: memory bandwidth, arithmetic and the time of a kernel launch."""

import difflib
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .. import files
from ..errors import InputError
from .measured import AGAIN, VERSION, Measured, read_measured

TABLE = Path(__file__).with_name("chips.json")
#: The file that `calibrate` writes and ``auto`` prefers.
CALIBRATED = "chip.json"
FAMILIES = ("apple", "nvidia")


@dataclass(frozen=True)
class Chip:
    """One machine.

    Attributes:
        id: Short name, such as ``m4-max-40``: forty GPU cores.
        name: The maker's name.
        family: ``"apple"`` or ``"nvidia"``; selects the efficiency.
        bandwidth_gbs: Memory bandwidth, 1e9 bytes a second.
        tflops: Dense half-precision matrix arithmetic, 1e12 FLOP a second.
        generation: 3 for M3; an NVIDIA architecture's major compute capability.
        dies: 2 for an Ultra.
        gpu_cores: GPU cores of Apple's chips.
        launch_us: Microseconds that a kernel takes beside its memory traffic; None for the
            family's. Where it is given, ``bandwidth_gbs`` is what kernels reach.
        source: Where the numbers come from.
        measured: What `calibrate` measured; predictions then take nothing from the family.
    """

    id: str
    name: str
    family: str
    bandwidth_gbs: float
    tflops: float
    generation: int = 0
    dies: int = 1
    gpu_cores: int | None = None
    launch_us: float | None = None
    source: str = ""
    measured: Measured | None = None


@functools.cache
def known_chips() -> dict[str, Chip]:
    """Every chip of the table by id."""
    table = files.read_json(TABLE)
    return {
        row["id"]: Chip(**row, source=table["sources"][row["family"]]) for row in table["chips"]
    }


def find_chip(text: str) -> Chip:
    """The chip for a name, ``auto`` or a JSON file.

    Raises:
        InputError: The chip is unknown; the message suggests similar names.
    """
    if text == "auto":
        return detect()
    known = known_chips()
    if text in known:
        return known[text]
    if text.endswith(".json") or Path(text).is_file():
        return read_chip(Path(text))
    near = difflib.get_close_matches(text.lower(), known, n=3, cutoff=0.5)
    variants = [name for name in known if name.startswith(f"{text.lower()}-")]
    hint = " or ".join(variants or near)
    raise InputError(
        f"no chip {text!r} is known"
        + (f", did you mean {hint}?" if hint else ": 'list' prints them.")
        + " A JSON file describes another one, as --optiq-calibrate-chip writes it"
    )


def read_chip(path: Path) -> Chip:
    """A chip described by a JSON object with the attributes of `Chip`.

    Raises:
        InputError: The file is missing or wrong, and the message names the field; or what was
            measured is of another version.
    """
    value = files.read_json(path)
    known = {field.name for field in fields(Chip)}
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold one JSON object with bandwidth_gbs and tflops")
    if "rates_gbs" in value:
        raise InputError(f"{path} was measured by an earlier release: {AGAIN}")
    if unknown := set(value) - known:
        raise InputError(f"{path} has unknown fields: {', '.join(sorted(unknown))[:80]}")
    value = {"id": path.stem, "name": path.stem, "family": "apple", **value}
    if value["family"] not in FAMILIES:
        raise InputError(
            f"{path}: family {files.shown(value['family'])} is none of {', '.join(FAMILIES)}"
        )
    for name in ("bandwidth_gbs", "tflops"):
        _check_positive(path, name, value.get(name))
    if value.get("launch_us") is not None:
        _check_positive(path, "launch_us", value["launch_us"])
    if value.get("measured") is not None:
        value["measured"] = read_measured(value["measured"], f"{path}: measured")
    for name in ("generation", "dies"):
        if type(value.get(name, 1)) is not int:
            raise InputError(f"{path}: {name} {files.shown(value[name])} is not a whole number")
    return Chip(**value)


def _check_positive(path: Path, name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise InputError(f"{path}: {name} {files.shown(value)} is not a number above 0")


def write_chip(path: Path, chip: Chip) -> None:
    """Write a chip as the JSON that `read_chip` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    value = asdict(chip)
    if chip.measured is not None:
        value["measured"] = {"version": VERSION, **value["measured"]}
    files.write_json(path, value)


def calibrated_path() -> Path:
    """Where this machine's own measurements are kept."""
    return files.cache_dir() / CALIBRATED


def detect(ask: Callable[[list[str]], str] | None = None) -> Chip:
    """This machine's chip: its own measurements if there are any, else the table's entry.

    Args:
        ask: Runs a command and returns what it prints, or an empty string.

    Raises:
        InputError: The machine is not in the table.
    """
    if calibrated_path().exists():
        return read_chip(calibrated_path())
    ask = ask or _output
    found = _apple(ask(["system_profiler", "SPDisplaysDataType", "-json"])) or _nvidia(
        ask(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    )
    if found is None:
        raise InputError(
            "this machine's chip is not known: name one ('list' prints them), or measure this one "
            "with --optiq-calibrate-chip"
        )
    return found


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _apple(text: str) -> Chip | None:
    try:
        display = json.loads(text)["SPDisplaysDataType"][0]
        model, cores = display["sppci_model"], int(display["sppci_cores"])
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    stem = model.removeprefix("Apple ").lower().replace(" ", "-")
    return known_chips().get(f"{stem}-{cores}")


def _nvidia(text: str) -> Chip | None:
    words = set(_words(text.strip().splitlines()[0])) if text.strip() else set()
    best: tuple[int, Chip] | None = None
    for chip in known_chips().values():
        own = _words(chip.name)
        model = next((word for word in own if any(c.isdigit() for c in word)), "")
        if chip.family == "nvidia" and model in words:
            score = len(words.intersection(own))
            if best is None or score > best[0]:
                best = (score, chip)
    return None if best is None else best[1]


def _words(name: str) -> list[str]:
    """A device's name in words, a memory size without its unit."""
    return re.findall(r"[a-z0-9]+", re.sub(r"(\d+) ?gb\b", r"\1", name.lower()))
