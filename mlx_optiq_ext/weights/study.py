"""From a model and a budget to a plan."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from .. import distributed, files
from ..errors import BudgetError, InputError
from ..model import memory
from ..model.layers import quantizable
from ..model.loading import load_unquantized, reload, to_compute_dtype
from ..model.stream import Stream, runs_whole
from ..planning.calibration import DEFAULT, Sampling, load_calibration
from .candidates import Size, Tensor, tensors
from .plan import Plan
from .plan_search import Study, search
from .precision import BITS, GROUP_SIZES
from .sensitivity.kl import kl
from .sensitivity.problem import Method, Problem
from .sensitivity.taylor import taylor

METHODS: Mapping[str, Method] = {"taylor": taylor, "kl": kl}


def study_model(
    model: nn.Module,
    tokenizer: Any,
    *,
    budget: float | None = None,
    bits: tuple[int, ...] | None = None,
    group_sizes: tuple[int, ...] | None = None,
    calibration: Path | None = None,
    sampling: Sampling = DEFAULT,
    method: Method = taylor,
    method_name: str = "taylor",
    refine: bool = False,
    digest: str | None = None,
    load: Callable[[], nn.Module] | None = None,
    scratch: Path | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Study:
    """Measure what every candidate precision of every quantizable tensor costs.

    The ranks of ``mlx.launch`` share the work, and all get the same result.

    Args:
        model: An unquantized mlx-lm model in the dtype it will be saved in. On a CPU its parameters
            are replaced by float32 copies, since half precision is slow there.
        tokenizer: Its tokenizer.
        budget: Bits per weight to check before anything is measured.
        bits: Widths to consider; None for all, with "leave unquantized" among the candidates.
        group_sizes: Group sizes to consider; None for all.
        calibration: A text or JSON-lines file, or None for mlx-lm's own text.
        sampling: How long its sequences are and how many.
        method: Measures the sensitivities.
        method_name: Its name, for the metadata.
        refine: Whether the quantized weights will be refined.
        digest: Hash of the model, under which measurements are kept; None keeps none for later.
        load: Loads the model again, not evaluated. With it, a model too large for memory is read
            layer by layer, which takes its parameters out of ``model``; see `memory.streams`.
        scratch: Folder for temporary files of such a model; None for the cache.
        progress: Whether to show progress bars.
        say: Receives one-line messages.

    Raises:
        BudgetError: The budget is outside of what this model allows; the message names the range.
        InputError: The model or an argument is not usable.
    """
    candidates = tuple(
        tensors(model, bits or BITS, group_sizes or GROUP_SIZES, allow_unquantized=bits is None)
    )
    if not candidates:
        raise InputError(
            f"no tensor of this model can be quantized in groups of {_names(group_sizes)}: give "
            "other --optiq-group-sizes"
        )
    size = Size.of(model, candidates)
    if budget is not None:
        check_budget(budget, size, candidates)
    stream = _stream(model, load, scratch, say)
    modules = dict(quantizable(model))
    weights = stream or {t.path: modules[t.path].weight for t in candidates}
    model.update(tree_map(to_compute_dtype, model.parameters()))
    data = load_calibration(model, tokenizer, calibration, say, sampling)
    distributed.compare(**{"model": digest, "calibration data": data.whole_digest})
    key = {"model": digest, "device": str(mx.default_device())} if digest else None
    problem = Problem(model, weights, candidates, data, key, progress, refine, say, stream=stream)
    say(
        f"[optiq] Measuring {len(candidates)} tensors with {method_name} on "
        f"{data.measured.size} tokens ({data.source})"
    )
    # A method may not know of other ranks, whose hardware may round in another way.
    return Study(problem, size, distributed.broadcast(method(problem)), method_name)


def plan_model(model: nn.Module, tokenizer: Any, budget: float, **settings: Any) -> Plan:
    """Give every quantizable tensor of a loaded model its own precision within a budget.

    Args:
        model: As for `study_model`.
        tokenizer: Its tokenizer.
        budget: Bits per weight as mlx-lm prints them: all stored bits over all parameters.
        settings: For `study_model`.

    Returns:
        A plan whose stored bits fit the budget.

    Raises:
        BudgetError: The budget is outside of what this model allows; the message names the range.
        InputError: The model or an argument is not usable.
    """
    return search(study_model(model, tokenizer, budget=budget, **settings), budget)


def _names(values: tuple[int, ...] | None) -> str:
    return ", ".join(str(v) for v in values or GROUP_SIZES)


def check_budget(budget: float, size: Size, candidates: tuple[Tensor, ...]) -> None:
    """Raise BudgetError with the feasible range if no plan fits a budget."""
    least = size.bits_per_weight(sum(t.stored_bits(t.precisions[0]) for t in candidates))
    most = size.bits_per_weight(sum(t.stored_bits(t.precisions[-1]) for t in candidates))
    if size.room(budget) < sum(t.stored_bits(t.precisions[0]) for t in candidates):
        raise BudgetError(
            f"a budget of {budget:g} bits per weight is too small for this model: with these "
            f"candidates it takes from {least:.3f} to {most:.3f}, counting scales, biases and what "
            "stays unquantized"
        )


def _stream(
    model: nn.Module,
    load: Callable[[], nn.Module] | None,
    scratch: Path | None,
    say: Callable[[str], None],
) -> Stream | None:
    """The stream of a model too large for memory, if it can be read that way; says so."""
    if load is None or not memory.streams(model):
        return None
    needed, limit = memory.resident_bytes(model) / 2**30, memory.limit() / 2**30
    start = f"[optiq] The weights take {needed:.2f} GiB in memory, of {limit:.2f} GiB"
    if not runs_whole(model):
        say(f"{start}, and this model cannot be read layer by layer: its layers run in parts")
        return None
    say(f"{start}: reading the model layer by layer")
    return Stream(model, load, to_compute_dtype, scratch or files.cache_dir())


def plan_folder(path_or_repo: str, budget: float, **settings: Any) -> Plan:
    """Load a model as ``mlx_lm.convert`` does and plan it.

    Args:
        path_or_repo: A folder or a Hub repository.
        budget: Bits per weight as mlx-lm prints them.
        settings: dtype, revision and trust_remote_code for `load_unquantized`, the others for
            `study_model`.
    """
    names = ("dtype", "revision", "trust_remote_code")
    source = {name: settings.pop(name) for name in names if name in settings}
    model, tokenizer, digest = load_unquantized(path_or_repo, **source)
    load = partial(reload, path_or_repo, **source)
    return plan_model(model, tokenizer, budget, digest=digest, load=load, **settings)
