"""The commands that convert a model within a budget, ours and others'."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from .recipes import NEAR, parsed

HERE = Path(__file__).parent

#: Budgets whose rivals' settings are known.
BUDGETS = (4.5, 4.0, 3.5, 3.0)

#: Bits per weight -> stock's uniform bits and group size, by size.
UNIFORM = {bits + 32 / group: (bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (64, 32)}

#: Learning rates of dwq: its own default and those that its documents and others use.
RATES = (1e-6, 1e-5, 5e-5)

#: Budget -> (bits, group size) for mlx_lm.dynamic_quant to choose between.
PAIRS = {
    4.5: (((3, 64), (5, 64)), ((4, 128), (5, 64))),
    4.0: (((3, 64), (4, 64)), ((3, 64), (5, 64))),
    3.5: (((2, 64), (4, 64)), ((3, 128), (4, 64))),
    3.0: (((2, 64), (3, 64)), ((2, 64), (4, 64))),
}

#: Budget -> bits that mlx-optiq's plan chooses among: those of its own example for few bits, all of
#: which it sweeps, or some. Its embedding gets the most bits that any tensor has.
AMONG = {
    4.5: ((2, 3, 4, 8), (3, 4, 8)),
    4.0: ((2, 3, 4, 8), (3, 4)),
    3.5: ((2, 3, 4, 8), (2, 3, 4)),
    3.0: ((2, 3, 4, 8), (2, 3, 4)),
}

#: Switches this package off, so that a command is the stock one.
STOCK = {"MLX_OPTIQ_EXT": "0"}


@dataclass(frozen=True)
class Setting:
    """What every method is given.

    Attributes:
        model: Folder of the original.
        calibration: Calibration text.
        windows: The same as tokens, from ``windows.py``.
        work: Folder for what is written.
        budget: Bits per weight.
        mlx_optiq: A virtual environment with mlx-optiq, if there is one.
        sweep_windows: Windows that its sweep uses; None for all that plans are measured on.
        ggml: ggml's library, if there is one.
        rates: Learning rates of dwq.
        recipes: llama.cpp's mixtures; None for those near the budget.
    """

    model: Path
    calibration: Path
    windows: Path
    work: Path
    budget: float
    mlx_optiq: Path | None = None
    sweep_windows: int | None = None
    ggml: Path | None = None
    rates: tuple[float, ...] = RATES
    recipes: tuple[str, ...] | None = None

    @property
    def uniform(self) -> tuple[int, int]:
        """Stock's bits and group size of the same bytes, or of the most within them."""
        return UNIFORM[max(size for size in UNIFORM if size <= self.budget)]

    @property
    def around(self) -> list[tuple[int, int]]:
        """Stock's bits and group sizes next to the budget: one if it has that very size."""
        below = max((size for size in UNIFORM if size <= self.budget), default=None)
        above = min((size for size in UNIFORM if size >= self.budget), default=None)
        return [UNIFORM[size] for size in dict.fromkeys((below, above)) if size is not None]

    @property
    def matrix(self) -> Path:
        """Where the importance matrix is kept, which serves every recipe."""
        return self.work / "importance.npz"

    @property
    def checkpoint(self) -> Path:
        """Where mlx-optiq keeps its sweep, which serves every budget."""
        return self.work / f"mlx-optiq-{self.sweep_windows or 'all'}.json"


@dataclass(frozen=True)
class Run:
    """One conversion.

    Attributes:
        label: What the table calls it.
        command: ``-m MODULE`` or a script, and arguments; it writes to ``out``.
        out: Folder of the converted model.
        environment: Added to the child's.
        python: The interpreter.
        shared: A file that serves several runs, with the time that it took beside it.
        scratch: A folder that must not be there from an earlier run.
        fixed: Whether the file is the same for every budget that it lies near.
    """

    label: str
    command: tuple[str, ...]
    out: Path
    environment: dict[str, str] = field(default_factory=dict)
    python: str = sys.executable
    shared: Path | None = None
    scratch: Path | None = None
    fixed: bool = False


def convert(setting: Setting, label: str, *options: str, **environment: str) -> Run:
    """A run of ``mlx_lm.convert``."""
    out = setting.work / f"{setting.budget:g}-{label.replace(' ', '-')}"
    command = ("-m", "mlx_lm", "convert", "--hf-path", str(setting.model), "--mlx-path", str(out))
    return Run(label, (*command, *options), out, environment)


def stock(setting: Setting) -> Iterator[Run]:
    """Stock's uniform conversions next to the budget."""
    for bits, group in setting.around:
        options = ("-q", "--q-bits", str(bits), "--q-group-size", str(group))
        run = convert(setting, f"stock {bits}g{group}", *options, **STOCK)
        yield replace(run, fixed=True)


def ours(label: str, *options: str) -> Callable[[Setting], Iterator[Run]]:
    """This package with some flags, nothing measured beforehand."""

    def runs(setting: Setting) -> Iterator[Run]:
        given = ("--optiq-budget", str(setting.budget))
        given += ("--optiq-calibration", str(setting.calibration))
        cache = setting.work / f"cache-{setting.budget:g}-{label}"
        run = convert(setting, label, *given, *options, MLX_OPTIQ_EXT_CACHE=str(cache))
        yield replace(run, scratch=cache)

    return runs


def dynamic_quant(setting: Setting) -> Iterator[Run]:
    """``mlx_lm.dynamic_quant`` with each pair of packings."""
    for low, high in PAIRS.get(setting.budget, ()):
        label = f"dynamic_quant {low[0]}g{low[1]}/{high[0]}g{high[1]}"
        out = setting.work / f"{setting.budget:g}-dynamic-{low[0]}g{low[1]}-{high[0]}g{high[1]}"
        options = ("--low-bits", str(low[0]), "--low-group-size", str(low[1]))
        options += ("--high-bits", str(high[0]), "--high-group-size", str(high[1]))
        options += ("--target-bpw", str(setting.budget))
        yield quant(setting, "dynamic_quant", label, out, *options)


def gptq(setting: Setting) -> Iterator[Run]:
    """``mlx_lm.gptq`` at stock's bits and group size, the embedding too."""
    bits, group = map(str, setting.uniform)
    options = ("--bits", bits, "--group-size", group)
    options += ("--fallback-bits", bits, "--fallback-group-size", group)
    yield quant(setting, "gptq", "gptq", setting.work / f"{setting.budget:g}-gptq", *options)


def dwq(setting: Setting) -> Iterator[Run]:
    """``mlx_lm.dwq`` from stock's bits and group size, at each learning rate, for 400 steps."""
    bits, group = map(str, setting.uniform)
    for rate in setting.rates:
        label = f"dwq {bits}g{group} {rate:g}"
        out = setting.work / f"{setting.budget:g}-{label.replace(' ', '-')}"
        options = ("--bits", bits, "--group-size", group, "--learning-rate", str(rate))
        options += ("--num-samples", "1600", "--max-seq-length", "512", "--batch-size", "4")
        yield replace(quant(setting, "dwq", label, out, *options), fixed=True)


def ggml(setting: Setting) -> Iterator[Run]:
    """K- and I-quants on both sides of the budget, by ggml's own encoders."""
    if setting.ggml is None:
        return
    near = NEAR[min(NEAR, key=lambda budget: abs(budget - setting.budget))]
    for recipe in setting.recipes or near:
        parsed(recipe)
        out = setting.work / f"ggml-{recipe.replace('/', '-').replace('+', 'w')}"
        paths = map(str, (HERE / "ggml.py", setting.ggml, setting.model, setting.windows, out))
        command = (*paths, recipe, "--matrix", str(setting.matrix))
        yield Run(recipe, command, out, STOCK, shared=setting.matrix, fixed=True)


def quant(setting: Setting, name: str, label: str, out: Path, *options: str) -> Run:
    """A run of one of mlx-lm's own quantization commands."""
    script = str(HERE / "mlx_lm_quant.py")
    paths = ("--model", str(setting.model), "--mlx-path", str(out))
    return Run(label, (script, name, str(setting.windows), *paths, *options), out, STOCK)


def mlx_optiq(setting: Setting) -> Iterator[Run]:
    """mlx-optiq, in the environment that holds it, once for each choice of bits."""
    if setting.mlx_optiq is None:
        return
    python, script = setting.mlx_optiq / "bin" / "python", str(HERE / "mlx_optiq.py")
    for among in AMONG.get(setting.budget, ()):
        bits = ",".join(map(str, among))
        out = setting.work / f"{setting.budget:g}-mlx-optiq-{bits}"
        label = f"mlx-optiq 0.7.7 {bits}"
        command = (script, str(setting.model), str(setting.windows), str(setting.checkpoint))
        command += ("--out", str(out), "--bytes-of", *map(str, setting.uniform))
        command += ("--among", *map(str, among))
        if setting.sweep_windows is not None:
            command += ("--windows", str(setting.sweep_windows))
            label += f", {setting.sweep_windows} windows"
        yield Run(label, command, out, {"PYTHONPATH": ""}, str(python), shared=setting.checkpoint)


METHODS: dict[str, Callable[[Setting], Iterator[Run]]] = {
    "stock": stock,
    "plan": ours("plan", "--optiq-effort", "plan"),
    "refine": ours("refine", "--optiq-effort", "refine"),
    "distill": ours("distill", "--optiq-effort", "distill"),
    "dwq": dwq,
    "ggml": ggml,
    "dynamic_quant": dynamic_quant,
    "gptq": gptq,
    "mlx-optiq": mlx_optiq,
}


@cache
def known_flags() -> str:
    """The help of ``mlx_lm.convert``, which names the flags that this version has."""
    command = [sys.executable, "-m", "mlx_lm", "convert", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def missing_flag(run: Run, known: str) -> str | None:
    """The first of our flags in a run that this version does not have."""
    flags = (word for word in run.command if word.startswith("--optiq-"))
    return next((flag for flag in flags if flag not in known), None)
