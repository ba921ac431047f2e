"""Everything that ``mlx_lm.convert`` needs to know before it quantizes by plan."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import distributed
from ..errors import InputError, OptiqError
from ..model.loading import load_unquantized, reload
from ..model.memory import block_bytes, streams
from ..planning.calibration import DEFAULT, Sampling
from .candidates import Size, tensors
from .plan import Plan
from .plan_file import read_plan
from .plan_search import Study, search
from .precision import BITS, GROUP_SIZES
from .rounding.distillation import STEPS, distill
from .rounding.refinement import Refined, judge, refine
from .sensitivity.problem import Method
from .sensitivity.taylor import differentiated
from .speed import search_speed, target
from .study import METHODS, study_model


@dataclass(frozen=True)
class Request:
    """What the user asked for; one of ``budget``, ``min_tps`` and ``plan_file`` is given.

    Attributes:
        budget: Bits per weight as mlx-lm prints them.
        min_tps: Tokens per second that the converted model shall be predicted to generate.
        chip: Where, for `latency.find_chip`.
        plan_file: A plan to apply instead of measuring one.
        bits: Widths to consider; None for all.
        group_sizes: Group sizes to consider; None for all.
        calibration: Calibration file; None for mlx-lm's own text.
        sampling: How long the calibration sequences are and how many.
        method: Name of the sensitivity method.
        methods: All methods by name.
        refine: Whether to round anew with error feedback.
        distill: Whether to tune scales and biases after that; implies ``refine``.
        protect: Whether both ends must keep 8 bits or more.
    """

    budget: float | None = None
    min_tps: float | None = None
    chip: str | None = None
    plan_file: Path | None = None
    bits: tuple[int, ...] | None = None
    group_sizes: tuple[int, ...] | None = None
    calibration: Path | None = None
    sampling: Sampling = DEFAULT
    method: str = "taylor"
    methods: dict[str, Method] = field(default_factory=lambda: dict(METHODS))
    refine: bool = False
    distill: bool = False
    protect: bool = False


@dataclass(frozen=True)
class Conversion:
    """What to do to the model.

    Attributes:
        plan: The precision of each tensor.
        refined: What to store instead of MLX's own rounding, by tensor path.
        post_processing: Entries for the metadata.
        study: The measurements, if any were made.
        block_bytes: Stored bytes of the largest decoder layer, if the model is too large for memory
            and must be written piece by piece; else None.
    """

    plan: Plan
    refined: Refined = field(default_factory=dict)
    post_processing: list[dict[str, Any]] = field(default_factory=list)
    study: Study | None = None
    block_bytes: int | None = None


def prepare(
    path_or_repo: str,
    request: Request,
    *,
    scratch: Path | None = None,
    say: Callable[[str], None] = print,
    progress: bool = True,
    **source: Any,
) -> Conversion:
    """Plan a conversion, and refine it if asked.

    The ranks of ``mlx.launch`` plan together. Rank 0 refines by itself and is the only one that
    speaks and has what was refined.

    Args:
        path_or_repo: A folder or a Hub repository.
        request: What to do.
        scratch: Folder for temporary files of a model too large for memory; None for the cache.
        say: Receives one-line messages.
        progress: Whether to show progress bars.
        source: For `load_unquantized`: dtype, revision, trust_remote_code.

    Raises:
        OptiqError: The request cannot be met; the message says what to change.
    """
    if request.distill:
        request = replace(request, refine=True)
    if not distributed.leads():
        say, progress = distributed.silent, False
    started = time.perf_counter()
    mx.reset_peak_memory()
    model, tokenizer, digest = load_unquantized(path_or_repo, **source)
    block = block_bytes(model) if streams(model) else None
    if request.distill and block is not None:
        raise InputError(
            "distillation holds the whole model, which is too large for this machine's memory: "
            "leave out --optiq-distill, or set MLX_OPTIQ_EXT_STREAM=0 to try all the same"
        )
    if request.plan_file is not None:
        found = tuple(tensors(model, allow_unquantized=True))
        plan = read_plan(request.plan_file, found, Size.of(model, found))
        if not request.refine:
            return Conversion(plan, block_bytes=block)
    wanted = None
    if request.min_tps is not None:
        aim = partial(target, path_or_repo, model, request.min_tps, request.chip or "auto")
        wanted = distributed.first(aim)
        wanted.check(tensors(model, request.bits or BITS, request.group_sizes or GROUP_SIZES))
    study = study_model(
        model,
        tokenizer,
        budget=request.budget,
        bits=request.bits,
        group_sizes=request.group_sizes,
        calibration=request.calibration,
        sampling=request.sampling,
        method=_unmeasured if request.plan_file else request.methods[request.method],
        method_name=request.method,
        refine=request.refine,
        digest=digest,
        load=partial(reload, path_or_repo, **source),
        scratch=scratch,
        progress=progress,
        say=say,
    )
    if request.plan_file is None:
        if wanted is not None:
            plan = search_speed(study, wanted, protect=request.protect, say=say)
        else:
            assert request.budget is not None
            plan = search(study, request.budget, protect=request.protect)
    conversion = Conversion(plan, study=study, block_bytes=block)
    if request.refine:
        if distributed.size() > 1:
            differentiated(study.problem)  # which the ranks share
        finish = partial(_finished, conversion, study, say, distill=request.distill)
        conversion = distributed.led(finish) or conversion
    seconds, peak = time.perf_counter() - started, mx.get_peak_memory() / 2**30
    say(f"[optiq] Planned in {seconds:.1f} s, peak memory {peak:.2f} GiB")
    return conversion


def _finished(
    conversion: Conversion, study: Study, say: Callable[[str], None], *, distill: bool
) -> Conversion:
    conversion = refined(conversion, study)
    return distilled(conversion, study, say) if distill else conversion


def _unmeasured(problem: Any) -> dict:
    return {}


def refined(conversion: Conversion, study: Study) -> Conversion:
    """Refine a planned conversion."""
    plan, problem = conversion.plan, study.problem
    values = refine(problem, plan.precisions)
    entry = {
        "op": "refine",
        "windows": len(problem.calibration.refining),
        "kl_before": plan.kl,
    }
    better = replace(plan, kl=judge(problem, plan.precisions, values))
    return replace(
        conversion,
        plan=better,
        refined=values,
        post_processing=[*conversion.post_processing, entry],
    )


def distilled(
    conversion: Conversion, study: Study, say: Callable[[str], None] = print
) -> Conversion:
    """Tune a refined conversion's scales and biases; keep them if the held-out KL falls."""
    plan, problem = conversion.plan, study.problem
    values = distill(problem, plan.precisions, conversion.refined)
    kl = judge(problem, plan.precisions, values)
    kept = plan.kl is not None and kl < plan.kl
    entry = {"op": "distill", "steps": STEPS, "kl_before": plan.kl, "kl": kl, "kept": kept}
    conversion = replace(conversion, post_processing=[*conversion.post_processing, entry])
    if not kept:
        say("[optiq] Distillation did not lower the KL on held-out sequences: left out")
        return conversion
    return replace(conversion, plan=replace(plan, kl=kl), refined=values)


def put(model: nn.Module, refined: Refined) -> None:
    """Replace what ``quantize_model`` stored in a model by the refined values.

    Raises:
        OptiqError: A tensor is not there, or is quantized in another way.
    """
    modules = dict(model.named_modules())
    for path, quantized in refined.items():
        module = modules.get(path)
        for name, value in zip(("weight", "scales", "biases"), quantized, strict=True):
            stored = None if module is None else module.get(name)
            if stored is None or (stored.shape, stored.dtype) != (value.shape, value.dtype):
                raise OptiqError(
                    f"{path}.{name} was refined as {value.dtype} {value.shape}, but mlx-lm made "
                    f"{'nothing' if stored is None else f'{stored.dtype} {stored.shape}'} of it: "
                    "please report this with your mlx-lm version"
                )
            setattr(module, name, value)
