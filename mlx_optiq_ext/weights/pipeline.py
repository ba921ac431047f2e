"""Prepares a conversion before ``mlx_lm.convert`` quantizes by plan.

`prepare` loads the model and gets a plan, from a file or by measuring. Then it refines and distills
the quantized weights, if requested.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import distributed, files
from ..errors import InputError
from ..model.loading import cast, half_dtype, load_unquantized, reload
from ..model.memory import block_bytes, streams
from ..model.source import SourceFiles, misread
from ..planning.calibration import DEFAULT
from .candidates import Size
from .plan import Plan
from .plan_file import read_plan
from .plan_search import Study, search
from .precision import AFFINE, Precision
from .request import Request
from .rounding.distillation import Settings, distill, placed
from .rounding.refinement import Refined, judge, refine
from .sensitivity.problem import Problem
from .study import Load, calibrated, study_model
from .targets import (
    CERTIFIED,
    Certificate,
    certified,
    check_sequences,
    sampled_beside,
    search_quality,
    search_speed,
    target,
)


@dataclass(frozen=True)
class Conversion:
    """The plan of a conversion, and its refined weights.

    Attributes:
        plan: The precision of each tensor.
        refined: Values to store instead of MLX's own rounding, by tensor path.
        parameters: Values to store of unquantized parameters, by parameter path.
        post_processing: Entries for the metadata.
        study: The measurements, if any were made.
        block_bytes: Stored bytes of the largest decoder layer, if the model is too large for memory
            and must be written piece by piece; else None.
        source: The model's files when they were first read.
        dtype: Value of ``mlx_lm.convert --dtype``.
    """

    plan: Plan
    refined: Refined = field(default_factory=dict)
    parameters: Mapping[str, mx.array] = field(default_factory=dict)
    post_processing: list[dict[str, Any]] = field(default_factory=list)
    study: Study | None = None
    block_bytes: int | None = None
    source: SourceFiles | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Source:
    """A loaded model.

    Attributes:
        path: The folder or repository.
        model: Not evaluated.
        tokenizer: The model's tokenizer.
        digest: Hash of its files and dtype.
        load: Loads it again.
        dtype: Value of ``mlx_lm.convert --dtype``, or what a float32 checkpoint is stored in.
    """

    path: str
    model: nn.Module
    tokenizer: Any
    digest: str
    load: Load
    dtype: str | None


def prepare(path_or_repo: str, request: Request, **source: Any) -> Conversion:
    """Plan a conversion, and refine it if asked.

    The processes of ``mlx.launch`` plan and refine together. The first one distills alone; only it
    prints messages and has what distillation changed.

    Args:
        path_or_repo: A folder or a Hub repository.
        request: The settings.
        source: For `load_unquantized`: dtype, revision, trust_remote_code.

    Raises:
        OptiqError: The request cannot be met; the message says what to change.
    """
    if not distributed.leads():
        request = replace(request, say=distributed.silent, progress=False)
    started = time.perf_counter()
    before = SourceFiles.of(path_or_repo, source.get("revision"))
    loaded = opened(path_or_repo, request, **source)
    block = block_bytes(loaded.model) if streams(loaded.model) else None
    if request.plan_file is not None:
        conversion = _from_file(loaded, request)
    else:
        conversion = _measured(loaded, request)
    seconds, peak = time.perf_counter() - started, mx.get_peak_memory() / 2**30
    request.say(f"[optiq] Planned in {seconds:.1f} s, peak memory {peak:.2f} GiB")
    if not before.states:
        before = SourceFiles.of(path_or_repo, source.get("revision"))  # downloaded in the meantime
    before = replace(before, digest=loaded.digest)
    return replace(conversion, block_bytes=block, source=before, dtype=loaded.dtype)


def opened(path_or_repo: str, request: Request, **source: Any) -> Source:
    """Load a model to plan it. A float32 checkpoint is cast to what it will be stored in.

    Args:
        path_or_repo: A folder or a Hub repository.
        request: The settings.
        source: For `load_unquantized`: dtype, revision, trust_remote_code.

    Raises:
        OptiqError: The model is not usable, or too large to distill it.
    """
    mx.reset_peak_memory()
    model, tokenizer, digest = load_unquantized(path_or_repo, **source)
    wrong = misread(model, path_or_repo, source.get("revision"))
    if wrong is not None:
        request.say(
            f"[optiq] mlx-lm reads the 8-bit floating-point weights of {wrong} as whole numbers, "
            "so that this model is not the one that was published: convert from a bfloat16 original"
        )
    if request.plan_file is None and source.get("dtype") is None:
        source["dtype"] = half = half_dtype(model)
        if half is not None:
            request.say(
                "[optiq] float32 checkpoint: scales, biases and what stays unquantized are stored "
                f"in {half} (--dtype float32 keeps them)"
            )
            cast(model, {}, half)
            digest = f"{digest.removesuffix('-None')}-{half}"
    load = partial(reload, path_or_repo, **source)
    if request.distill and streams(model):
        raise InputError(
            "distillation holds the whole model, which is too large for this machine's memory: "
            "give --optiq-effort refine, or set MLX_OPTIQ_EXT_STREAM=0 to try all the same"
        )
    return Source(path_or_repo, model, tokenizer, digest, load, source.get("dtype"))


def _from_file(source: Source, request: Request) -> Conversion:
    """Apply a saved plan; calibration text is needed for refinement only."""
    assert request.plan_file is not None
    candidates = request.candidates(source.model)
    size = Size.of(source.model, candidates)
    plan = read_plan(request.plan_file, candidates, size)
    for note in plan.notes:
        request.say(f"[optiq] {note}")
    _check_room(request, plan.achieved_bpw * size.parameters / 8)
    if not request.refine:
        return Conversion(plan)
    others = [path for path, p in plan.precisions.items() if p.quantized and p.mode != AFFINE]
    if others:
        raise InputError(
            f"{request.plan_file} has {others[0]} in mode {plan.precisions[others[0]].mode}, which "
            "--optiq-effort refine cannot round: leave it out, or give every tensor the mode affine"
        )
    problem = calibrated(
        source.model, source.tokenizer, request, digest=source.digest, load=source.load
    )
    return _finished(Conversion(plan), problem, request)


def _measured(source: Source, request: Request) -> Conversion:
    """Measure sensitivity and search a plan for a budget or a speed."""
    wanted, alone = None, request.alone(source.model)
    if request.budget is not None:
        whole = Size.of(source.model, request.candidates(source.model))
        _check_room(request, whole.target(request.budget) * whole.parameters / 8)
    if request.min_tps is not None:
        aim = partial(target, source.path, source.model, request.min_tps, request.chip or "auto")
        wanted = distributed.first(aim)
        wanted.check(request.candidates(source.model))
    if request.max_kl is not None and request.sampling == DEFAULT:
        request = replace(request, sampling=CERTIFIED)
    study = study_model(
        source.model, source.tokenizer, request, digest=source.digest, load=source.load
    )
    if request.max_kl is not None:
        return _certified(study, source, request, alone)
    if wanted is not None:
        plan = search_speed(study, wanted, protect=request.protect, say=request.say)
    else:
        assert request.budget is not None
        plan = search(study, request.budget, protect=request.protect)
    done = _finished(Conversion(plan, study=study), study.problem, request)
    return replace(done, plan=done.plan.beside(alone))


def _certified(
    study: Study, source: Source, request: Request, alone: dict[str, Precision]
) -> Conversion:
    """The smallest finished conversion that is near enough to the original."""
    assert request.max_kl is not None
    problem = study.problem
    check_sequences(problem.calibration.held_out)
    others = distributed.first(partial(sampled_beside, problem, source.tokenizer))

    def finish(plan: Plan) -> Conversion:
        return _finished(Conversion(plan, study=study), problem, request)

    def certify(done: Conversion) -> Certificate:
        return distributed.first(
            lambda: certified(problem, done.plan.precisions, done.refined, done.parameters, others)
        )

    done, found = search_quality(
        study, request.max_kl, finish, certify, protect=request.protect, say=request.say
    )
    request.say(found.summary())
    plan = replace(done.plan.beside(alone), certificate=found.entry())
    return replace(done, plan=plan)


def _check_room(request: Request, needed: float) -> None:
    if request.scratch is not None:
        files.check_room(request.scratch, needed)


def _finished(conversion: Conversion, problem: Problem, request: Request) -> Conversion:
    """Refine and distill if requested; the processes refine together, the first one distills."""
    if not request.refine:
        return conversion
    done = refined(conversion, problem)
    if not done.refined:
        done = _unrefined(done, request)
    elif request.distill:
        work = partial(distilled, done, problem, request.distillation)
        done = distributed.led(work) or done
    notes = (*conversion.plan.notes, *problem.findings.notes)
    return replace(done, plan=replace(done.plan, notes=tuple(dict.fromkeys(notes))))


def refined(conversion: Conversion, problem: Problem) -> Conversion:
    """Round a planned conversion with error feedback; keep it if the held-out KL falls."""
    plan = conversion.plan
    values = refine(problem, plan.precisions)
    kl = judge(problem, plan.precisions, values)
    plain = [each for each in (plan.kl, plan.below and plan.below.kl) if each is not None]
    # What a saved plan says of its KL may be on another text.
    kept = conversion.study is None or not plain or kl < min(plain)
    entry = {
        "op": "refine",
        "sequences": len(problem.calibration.refining),
        "kl_before": plan.kl,
        "kl": kl,
        "kept": kept,
    }
    conversion = replace(conversion, post_processing=[*conversion.post_processing, entry])
    if not kept:
        problem.note("Refinement did not lower the KL on held-out sequences: left out")
        return conversion
    return replace(conversion, plan=replace(plan, kl=kl), refined=values)


def _unrefined(conversion: Conversion, request: Request) -> Conversion:
    """The best plan for MLX's own rounding, where refinement was left out."""
    study = conversion.study
    if study is None or request.budget is None:
        return conversion
    study = replace(study, problem=replace(study.problem, refine=False))
    return replace(conversion, plan=search(study, request.budget, protect=request.protect))


def distilled(conversion: Conversion, problem: Problem, settings: Settings) -> Conversion:
    """Tune what a refined conversion stores; keep it if the held-out KL falls."""
    plan = conversion.plan
    found = distill(problem, plan.precisions, conversion.refined, settings)
    in_model = {path: value.astype(problem.dtype) for path, value in found.parameters.items()}
    with placed(problem.model, in_model):
        kl = judge(problem, plan.precisions, found.refined)
    kept = plan.kl is not None and kl < plan.kl
    entry = {"op": "distill", "steps": found.steps, "kl_before": plan.kl, "kl": kl, "kept": kept}
    conversion = replace(conversion, post_processing=[*conversion.post_processing, entry])
    if not kept:
        problem.say("[optiq] Distillation did not lower the KL on held-out sequences: left out")
        return conversion
    plan = replace(plan, kl=kl)
    return replace(conversion, plan=plan, refined=found.refined, parameters=found.parameters)
