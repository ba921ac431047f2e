"""Runs ``mlx_lm.convert`` with our options."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine import session
from .options import Options

if TYPE_CHECKING:
    from mlx_optiq_ext.modalities import Report
    from mlx_optiq_ext.weights import Conversion, Request
    from mlx_optiq_ext.weights.report.card import Origin


@dataclass
class Run:
    """State of a running conversion.

    Attributes:
        options: The options that were given.
        conversion: The plan and the refined weights, once the model was measured.
        stripped: What was left out of a multimodal checkpoint, once the model was loaded.
    """

    options: Options
    conversion: "Conversion | None" = None
    stripped: "Report | None" = None


def convert(run: Run, stock: Callable[..., Any], call: dict[str, Any]) -> None:
    """Convert with our options.

    Args:
        run: The state, which the patches of ``mlx_lm.utils`` read.
        stock: ``mlx_lm.convert``.
        call: Its arguments, by name.
    """
    from mlx_optiq_ext import distributed

    options = run.options
    if options.kv_only:
        _plan_kv(options, Path(call["hf_path"]), call["hf_path"])
    elif options.forecast:
        _forecast(options, call)
    elif options.planned:
        _by_plan(run, stock, call)
    elif options.kv_budget is not None:
        distributed.led(lambda: _with_kv(options, stock, call))
    else:
        distributed.led(lambda: stock(**call))


def interrupted() -> str:
    """What an interrupted conversion leaves: measurements on disk, and no output."""
    from mlx_optiq_ext import files

    run = session.state(Run)
    if run is None or not files.records_kept():
        return ": nothing was written"
    if run.options.how_far != "plan":
        return "; the same command goes on from here, with its measurements and a new refinement"
    return "; the same command goes on from here"


def _by_plan(run: Run, stock: Callable[..., Any], call: dict[str, Any]) -> None:
    """Convert by plan. Every process plans, and the first one writes."""
    from mlx_optiq_ext import distributed, files, weights
    from mlx_optiq_ext.weights import report
    from mlx_optiq_ext.weights.report import card

    from ...installation import gate

    gate().require("weights")
    target, upload = Path(call["mlx_path"]), call.pop("upload_repo", None)
    with files.staged(target) if distributed.leads() else nullcontext() as folder:
        conversion = weights.prepare(
            call["hf_path"],
            _request(run.options, None if folder is None else folder.parent),
            dtype=call.get("dtype"),
            revision=call.get("revision"),
            trust_remote_code=call.get("trust_remote_code", False),
        )
        plan, evidence, page = conversion.plan, None, run.options.report
        if page is not None and conversion.study is not None:
            # Gathered while the model is loaded; the page appears only if all else succeeds.
            evidence = report.gather(conversion.study, plan, call["hf_path"])
        # Stock loads the model anew; the measured copy must not stay beside it.
        run.conversion = conversion = replace(conversion, study=None)
        if folder is not None:
            with distributed.alone():
                _write(run, conversion, stock, call, folder)
                card.write(folder, plan, _origin(call), upload or target.name)
                if conversion.source is not None:
                    conversion.source.check()
    if not distributed.leads():
        return
    if run.stripped is not None:
        print(run.stripped.summary())
    print(plan.summary())
    if evidence is not None and page is not None:
        report.write(page, evidence)
        print(f"[optiq] Report: {page}")
    if upload is not None:
        card.upload(target, upload)


def _origin(call: dict[str, Any]) -> "Origin":
    """What is converted, and by which command line."""
    from mlx_optiq_ext.weights.report.card import Origin

    return Origin.of(call["hf_path"], sys.argv[1:])


def _write(
    run: Run,
    conversion: "Conversion",
    stock: Callable[..., Any],
    call: dict[str, Any],
    folder: Path,
) -> None:
    """Stock's conversion by plan into a folder, with what belongs beside the weights."""
    from mlx_optiq_ext import modalities, weights

    plan = conversion.plan
    # The loaded model is stripped while stock runs, by the patch of mlx_lm.utils.load.
    stock(
        **{
            **call,
            "mlx_path": str(folder),
            "dtype": conversion.dtype,
            "quantize": True,
            "q_group_size": plan.default.group_size,
            "q_bits": plan.default.bits,
        }
    )
    stripped = run.stripped
    if stripped is not None:
        modalities.remove_processor_files(folder)
    done = [stripped.entry()] if stripped is not None else []
    plan.save(
        folder,
        post_processing=[*done, *conversion.post_processing],
        origin=_origin(call).entries(),
    )
    weights.check_written(folder, plan)
    if run.options.kv_budget is not None:
        _plan_kv(run.options, folder, call["hf_path"])


def _forecast(options: Options, call: dict[str, Any]) -> None:
    """Say what conversions would come to; every process measures, and the first one says it."""
    from mlx_optiq_ext import distributed
    from mlx_optiq_ext.weights import curve

    from ...installation import gate

    gate().require("weights")
    found = curve.forecast(
        call["hf_path"],
        _request(options, None),
        options.budget or (),
        dtype=call.get("dtype"),
        revision=call.get("revision"),
        trust_remote_code=call.get("trust_remote_code", False),
    )
    if not distributed.leads():
        return
    print(curve.summary(found))
    if options.report is not None:
        curve.write(options.report, found)
        print(f"[optiq] Drawing: {options.report}")


def _with_kv(options: Options, stock: Callable[..., Any], call: dict[str, Any]) -> None:
    """Stock's conversion, and a KV plan beside what it wrote."""
    from mlx_lm.utils import upload_to_hub

    from mlx_optiq_ext import files

    target, upload = Path(call["mlx_path"]), call.pop("upload_repo", None)
    with files.staged(target) as folder:
        stock(**{**call, "mlx_path": str(folder)})
        _plan_kv(options, folder, call["hf_path"])
    if upload is not None:
        upload_to_hub(str(target), upload)


def _plan_kv(options: Options, folder: Path, name: str) -> None:
    """Measure the MLX model in a folder and write its KV plan there."""
    from mlx_optiq_ext import distributed
    from mlx_optiq_ext.kv.planning import pipeline

    assert options.kv_budget is not None
    found, measured = pipeline.plan_kv(
        str(folder), options.kv_budget, calibration=options.calibration
    )
    if distributed.leads():
        pipeline.write(folder, found, measured, model=name, budget=options.kv_budget)
        print(found.summary())


def _request(options: Options, scratch: Path | None) -> "Request":
    """The options as the library takes them."""
    from mlx_optiq_ext import weights

    speed = options.min_tps
    return weights.Request(
        budget=None if options.budget is None else options.budget[0],
        min_tps=None if speed is None else speed.tps,
        chip=None if speed is None else speed.chip,
        max_kl=options.max_kl,
        plan_file=options.plan,
        bits=options.bits,
        group_sizes=options.group_sizes,
        pins=tuple(options.pin),
        calibration=options.calibration,
        method=options.sensitivity or weights.Request.method,
        effort=options.how_far,
        protect=options.protect,
        scratch=scratch,
    )
