"""Makes a plan from a model and a request: calibrates, measures, searches."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from .. import distributed, files
from ..errors import BudgetError, InputError
from ..model import memory
from ..model.finite import check_arrays, check_outputs, check_parameters
from ..model.layers import quantizable
from ..model.loading import load_unquantized, reload, to_compute_dtype
from ..model.stream import Stream, runs_whole
from ..planning.budget import Budget, size_text
from ..planning.calibration import load_calibration
from .candidates import Size, Tensor
from .pins import Pin
from .plan import Plan
from .plan_search import Study, search
from .request import Request
from .sensitivity.method import Need
from .sensitivity.problem import Problem, journal_key

#: Loads a model again, not evaluated.
Load = Callable[[], nn.Module]


def plan_folder(path_or_repo: str, request: Request, **source: Any) -> Plan:
    """Load a model as ``mlx_lm.convert`` does and plan it.

    Args:
        path_or_repo: A folder or a Hub repository.
        request: Settings with a budget.
        source: Arguments of `load_unquantized`: dtype, revision, trust_remote_code.

    Raises:
        BudgetError: The budget is outside of what this model allows; the message names the range.
        InputError: The model or the request is not usable.
    """
    model, tokenizer, digest = load_unquantized(path_or_repo, **source)
    load = partial(reload, path_or_repo, **source)
    return plan_model(model, tokenizer, request, digest=digest, load=load)


def plan_model(
    model: nn.Module,
    tokenizer: Any,
    request: Request,
    *,
    digest: str | None = None,
    load: Load | None = None,
) -> Plan:
    """Give every quantizable tensor of a loaded model its own precision within a budget.

    Args:
        model: The model, as in `study_model`.
        tokenizer: The model's tokenizer.
        request: Settings with a budget.
        digest: Hash of the model, as in `study_model`.
        load: Loads the model again, as in `study_model`.

    Returns:
        A plan whose stored bits fit the budget.

    Raises:
        BudgetError: The budget is outside of what this model allows; the message names the range.
        InputError: The model or the request is not usable.
    """
    if request.budget is None:
        raise InputError("a plan needs a budget: give Request(budget=4.5)")
    alone = request.alone(model)
    study = study_model(model, tokenizer, request, digest=digest, load=load)
    return search(study, request.budget, protect=request.protect).beside(alone)


def _mark(problem: Problem) -> list[Any]:
    """Key of the journal entry that says that a problem is measured completely."""
    keys = [journal_key(t.path, p) for t in problem.tensors for p in t.precisions]
    digest = hashlib.sha256(repr((keys, problem.refine)).encode()).hexdigest()
    return ["complete", digest]


def study_model(
    model: nn.Module,
    tokenizer: Any,
    request: Request,
    *,
    digest: str | None = None,
    load: Load | None = None,
) -> Study:
    """Measure the sensitivity of every quantizable tensor at every candidate precision.

    The processes of ``mlx.launch`` share the work, and all get the same result.

    Args:
        model: An unquantized mlx-lm model in the dtype it will be saved in. On a CPU its parameters
            are replaced by float32 copies, since half precision is slow there.
        tokenizer: The model's tokenizer.
        request: Settings; a budget is checked first, if there is one.
        digest: Hash of the model, under which measurements are kept; None keeps none for later.
        load: Loads the model again. With it, a model too large for memory is read layer by layer,
            which takes its parameters out of ``model``; see `memory.streams`.

    Raises:
        BudgetError: The budget is outside of what this model allows; the message names the range.
        InputError: The model or the request is not usable.
    """
    method = request.sensitivity
    problem = calibrated(model, tokenizer, request, digest=digest, load=load)
    data, on = problem.calibration, ""
    if Need.CALIBRATION in method.needs:
        on = f" on {data.measured.size} tokens ({data.source})"
    journal, mark = problem.journal(method.name, method.version), _mark(problem)
    if journal.get(mark) is None:
        doing, where = "Measuring", ""
    else:
        doing, where = "Reading the measurements of", f" from {files.cache_dir()}"
    request.say(f"[optiq] {doing} {len(problem.tensors)} tensors with {method.name}{on}{where}")
    # A method may not support several processes, whose hardware may round differently.
    sensitivity = distributed.broadcast(method.measure(problem))
    kept, refined = (
        problem.journal(name, method.version) for name in (method.name, f"{method.name} refined")
    )
    if (len(kept) or len(refined)) and kept.get(mark) is None:
        kept.add(mark, 1.0)
        kept.exchange()
    return Study(problem, sensitivity, method.name)


def calibrated(
    model: nn.Module,
    tokenizer: Any,
    request: Request,
    *,
    digest: str | None = None,
    load: Load | None = None,
) -> Problem:
    """A model with its calibration sequences, ready to be measured or rounded.

    Args:
        model: The model, as in `study_model`.
        tokenizer: The model's tokenizer.
        request: What to choose from, where the calibration text is, and whether the weights will
            be refined; a budget is checked first, if it has one.
        digest: Hash of the model, as in `study_model`.
        load: Loads the model again, as in `study_model`.

    Raises:
        BudgetError: The budget is outside of what this model allows; the message names the range.
        InputError: The model or the request is not usable.
    """
    candidates = request.candidates(model)
    size = Size.of(model, candidates)
    if request.budget is not None:
        check_budget(request.budget, size, candidates, request.pins)
    stream = _stream(model, load, request)
    modules = dict(quantizable(model))
    weights = stream or {t.path: modules[t.path].weight for t in candidates}
    model.update(tree_map(to_compute_dtype, model.parameters()))
    check_parameters(model)
    if stream is not None:
        check_arrays((f"{path}.weight", array) for path, array in stream.items())
    sampling = request.sampling
    if stream is not None:  # each token that is sampled would read the whole model
        sampling = replace(sampling, beside=0)
    data = load_calibration(
        model,
        tokenizer,
        request.calibration,
        request.say,
        sampling,
        refining=request.refine,
        distilling=request.distill,
    )
    distributed.compare(**{"model": digest, "calibration data": data.whole_digest})
    if stream is None:  # otherwise this would read the whole model again
        check_outputs(model, mx.array(data.tokens[:1]))
    return Problem(
        model=model,
        weights=weights,
        tensors=candidates,
        size=size,
        calibration=data,
        key={"model": digest, "device": str(mx.default_device())} if digest else None,
        progress=request.progress,
        refine=request.refine,
        say=request.say,
        stream=stream,
        scratch=request.scratch,
    )


def check_budget(
    budget: float | Budget, size: Size, candidates: tuple[Tensor, ...], pins: Sequence[Pin] = ()
) -> None:
    """Raise BudgetError with the feasible range if no plan fits a budget."""
    smallest = sum(t.stored_bits(t.precisions[0]) for t in candidates)
    largest = sum(t.stored_bits(t.precisions[-1]) for t in candidates)
    if size.room(size.target(budget)) >= smallest:
        return
    if size.limit(budget) is None:
        asked = f"{size.target(budget):g} bits per weight"
        least, most = (f"{size.bits_per_weight(bits):.3f}" for bits in (smallest, largest))
    else:
        asked = str(budget)
        least, most = (size_text(size.file_bytes(bits)) for bits in (smallest, largest))
    why = f"with {'the pins' if pins else 'these candidates'} it takes from {least} to {most}"
    raise BudgetError(
        f"a budget of {asked} is too small for this model: {why}, counting scales, biases and what "
        "stays unquantized"
    )


def _stream(model: nn.Module, load: Load | None, request: Request) -> Stream | None:
    """The stream of a model that is too large for memory, or None; prints a line."""
    if load is None or not memory.streams(model):
        return None
    needed, limit = memory.resident_bytes(model) / 2**30, memory.memory_limit() / 2**30
    start = f"[optiq] The weights take {needed:.2f} GiB in memory, of {limit:.2f} GiB"
    if not runs_whole(model):
        request.say(
            f"{start}, and this model cannot be read layer by layer: its layers run in parts"
        )
        return None
    request.say(f"{start}: reading the model layer by layer")
    return Stream(model, load, to_compute_dtype, request.scratch or files.cache_dir())
