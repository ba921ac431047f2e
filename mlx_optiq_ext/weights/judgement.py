"""Whole plans, each judged on held-out sequences once, and kept for every later budget.

A plan that was judged for one budget is a candidate for all others that it fits. So a larger budget
never ends in a worse plan than a smaller one did.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import distributed, files
from ..planning.journal import LARGEST, usable
from .precision import MODES, Precision
from .sensitivity.problem import Problem, divergences

Precisions = dict[str, Precision]
#: KL divergences of whole plans, (held-out sequences, length) each, in nats.
Measure = Callable[[Problem, list[Precisions]], Sequence[np.ndarray]]

#: Of what is kept; what another version judged is not read.
VERSION = 1
#: Tokens whose mean counts as one observation when two plans are compared.
PIECE = 64
#: Nats per token that float32 cannot tell from nothing.
LEAST = 1e-7


@dataclass(frozen=True)
class Verdict:
    """How far a plan's model is from the unquantized one.

    Attributes:
        kl: Mean over the held-out sequences in nats per token; infinite where it overflows.
        pieces: Means over their pieces, in order, to compare plans on the same text.
    """

    kl: float
    pieces: tuple[float, ...]

    @classmethod
    def of(cls, divergence: np.ndarray) -> "Verdict":
        """From the divergence of each token, (sequences, length)."""
        count = max(1, round(divergence.shape[1] / PIECE))
        parts = [part.mean() for row in divergence for part in np.array_split(row, count)]
        kl = float(divergence.mean(dtype=np.float64))
        return cls(kl if math.isfinite(kl) else math.inf, tuple(map(float, parts)))

    def beats(self, other: "Verdict") -> bool:
        """Whether it is better beyond noise.

        That is on the mean, and by more than two standard errors of the mean log ratio over paired
        pieces: in it a piece of hard text counts no more than one of easy text.
        """
        if not (math.isfinite(self.kl) and math.isfinite(other.kl)) or len(self.pieces) < 2:
            return self.kl < other.kl
        ratios = np.subtract(*(np.log(np.maximum(v.pieces, LEAST)) for v in (self, other)))
        error = ratios.std(ddof=1) / math.sqrt(len(ratios))
        return self.kl < other.kl and bool(ratios.mean() < -2 * error)


@dataclass(frozen=True)
class Judged:
    """A plan that was judged.

    Attributes:
        name: Of the plan, for the user.
        precisions: The plan.
        verdict: What it came to.
        chosen: Whether a conversion ended with it.
    """

    name: str
    precisions: Precisions
    verdict: Verdict
    chosen: bool = False


class Judgements:
    """The plans of a problem that were judged, in this run and in earlier ones."""

    def __init__(self, problem: Problem, measure: Measure = divergences):
        """Read what is known.

        Args:
            problem: With a key, if judgements are to be kept on disk.
            measure: What judges plans that are not known.
        """
        self._problem, self._measure = problem, measure
        self._paths = [t.path for t in problem.tensors]
        self._known: dict[str, Judged] = problem.findings.judged
        self._path = _file(problem)
        if self._path is not None and not self._known:
            for entry in distributed.first(self._read):
                found = _judged(entry, self._paths)
                if found is not None:
                    self._known[self._spelled(found.precisions)] = found

    def _read(self) -> list[dict[str, Any]]:
        return [] if self._path is None else list(files.read_records(self._path, LARGEST))

    def of(self, plans: Mapping[str, Precisions], budget: float) -> dict[str, Verdict]:
        """The verdicts of some plans by name; those that are not known are judged and kept.

        Args:
            plans: Name -> plan.
            budget: That they were made for, in bits per weight.
        """
        spelled = {name: self._spelled(plan) for name, plan in plans.items()}
        new = {key: name for name, key in spelled.items() if key not in self._known}
        found = self._measure(self._problem, [plans[name] for name in new.values()]) if new else []
        for (key, name), divergence in zip(new.items(), found, strict=True):
            label = name if name.startswith("uniform") else f"{name}, for a budget of {budget:g}"
            self._keep(key, Judged(label, plans[name], Verdict.of(divergence)))
        return {name: self._known[key].verdict for name, key in spelled.items()}

    def choose(self, plan: Precisions) -> None:
        """Keep that a conversion ends with a plan."""
        key = self._spelled(plan)
        if not self._known[key].chosen:
            self._keep(key, replace(self._known[key], chosen=True))

    def __iter__(self) -> Iterator[Judged]:
        return iter(list(self._known.values()))

    def _spelled(self, plan: Precisions) -> str:
        return ",".join(
            f"{p.bits}/{p.group_size}/{p.mode}" for p in (plan[path] for path in self._paths)
        )

    def _keep(self, key: str, judged: Judged) -> None:
        self._known[key] = judged
        verdict = judged.verdict
        if self._path is None or not distributed.leads() or not usable(verdict.kl):
            return
        entry = {"name": judged.name, "plan": key, "chosen": judged.chosen, "kl": verdict.kl}
        files.append_records(self._path, [{**entry, "pieces": verdict.pieces}], LARGEST)


def _file(problem: Problem) -> Path | None:
    """Where the judgements of a problem are kept, by all that decides them."""
    if problem.key is None:
        return None
    held_out = problem.calibration.held_out
    paths = "\n".join(t.path for t in problem.tensors)
    told = repr((sorted(problem.key.items()), held_out.shape, paths, PIECE, VERSION)).encode()
    digest = hashlib.sha256(told + problem.calibration.tokens.tobytes() + held_out.tobytes())
    return files.cache_dir() / "judged" / f"{digest.hexdigest()[:32]}.jsonl"


def _finite(value: Any) -> bool:
    """Rounding may leave a mean just below zero."""
    return type(value) in (int, float) and abs(value) < 1e300


def _judged(entry: Mapping[str, Any], paths: list[str]) -> Judged | None:
    """A record as it was written, or None if it is none."""
    name, plan, kl, pieces = (entry.get(field) for field in ("name", "plan", "kl", "pieces"))
    if not isinstance(name, str) or not isinstance(plan, str) or not usable(kl):
        return None
    if not isinstance(pieces, list) or not pieces or not all(map(_finite, pieces)):
        return None
    precisions = []
    for word in plan.split(","):
        bits, _, rest = word.partition("/")
        group, _, mode = rest.partition("/")
        if not (bits.isdecimal() and group.isdecimal() and mode in MODES) or len(word) > 40:
            return None
        precisions.append(Precision(int(bits), int(group), mode))
    if len(precisions) != len(paths):
        return None
    verdict = Verdict(float(kl), tuple(map(float, pieces)))
    chosen = entry.get("chosen") is True
    return Judged(name, dict(zip(paths, precisions, strict=True)), verdict, chosen)
