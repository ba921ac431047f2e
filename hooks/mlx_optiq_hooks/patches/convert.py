"""``mlx_lm.convert``: plans the precisions before stock converts with them."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from ..engine import session
from ..engine.patch import Patch, bind, of


def convert(wrapped, instance, args, kwargs):
    running = session.current()
    if running is None or running.options is None or running.command != "convert":
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext import distributed

    options, call = running.options, bind(wrapped, args, kwargs)
    if options.kv_only:
        return _plan_kv(options, Path(call["hf_path"]), call["hf_path"])
    if session.planned(running):
        return _planned(wrapped, running, call)
    if options.kv_budget is not None:
        return distributed.led(lambda: _with_kv(wrapped, options, call))
    return distributed.led(lambda: wrapped(**call))


def _planned(wrapped, running, call):
    """The conversion by plan; of several ranks all plan, and the first one writes."""
    from mlx_lm.utils import upload_to_hub

    from mlx_optiq_ext import distributed, files, weights
    from mlx_optiq_ext.weights import report

    from ..installation import gate

    gate().require("weights")
    options = running.options
    target, upload = Path(call["mlx_path"]), call.pop("upload_repo", None)
    with files.staged(target) if distributed.leads() else nullcontext() as folder:
        conversion = weights.prepare(
            call["hf_path"],
            _request(options),
            scratch=None if folder is None else folder.parent,
            dtype=call.get("dtype"),
            revision=call.get("revision"),
            trust_remote_code=call.get("trust_remote_code", False),
        )
        plan, evidence, page = conversion.plan, None, options.report
        if page is not None and conversion.study is not None:
            # Gathered while the model is loaded; the page appears only if all else succeeds.
            evidence = report.gather(conversion.study, plan, call["hf_path"])
        # Stock loads the model anew; the measured copy must not stay beside it.
        running.results["conversion"] = replace(conversion, study=None)
        del conversion
        if folder is not None:
            with distributed.alone():
                _write(wrapped, running, call, folder)
    if not distributed.leads():
        return
    stripped = running.results.get("modalities")
    if stripped is not None:
        print(stripped.summary())
    print(plan.summary())
    if evidence is not None and page is not None:
        report.write(page, evidence)
        print(f"[optiq] Report: {page}")
    if upload is not None:
        upload_to_hub(str(target), upload)


def _write(wrapped, running, call, folder):
    """Stock's conversion by plan into a folder, with what belongs beside the weights."""
    from mlx_optiq_ext import modalities, weights

    options, conversion = running.options, running.results["conversion"]
    plan = conversion.plan
    call.update(
        mlx_path=str(folder),
        quantize=True,
        q_group_size=plan.default.group_size,
        q_bits=plan.default.bits,
    )
    wrapped(**call)
    stripped = running.results.get("modalities")
    if stripped is not None:
        modalities.remove_processor_files(folder)
    done = [stripped.entry()] if stripped else []
    plan.save(folder, post_processing=[*done, *conversion.post_processing])
    weights.check_written(folder, plan)
    if options.kv_budget is not None:
        _plan_kv(options, folder, call["hf_path"])


def _with_kv(wrapped, options, call):
    """Stock's conversion, and a KV plan beside what it wrote."""
    from mlx_lm.utils import upload_to_hub

    from mlx_optiq_ext import files

    target, upload = Path(call["mlx_path"]), call.pop("upload_repo", None)
    with files.staged(target) as folder:
        wrapped(**{**call, "mlx_path": str(folder)})
        _plan_kv(options, folder, call["hf_path"])
    if upload is not None:
        upload_to_hub(str(target), upload)


def _plan_kv(options, folder: Path, name: str) -> None:
    """Measure the MLX model in a folder and write its KV plan there."""
    from mlx_optiq_ext import distributed
    from mlx_optiq_ext.kv.planning import pipeline as conversion

    found, costs = conversion.plan_kv(
        str(folder), options.kv_budget, calibration=options.calibration
    )
    if distributed.leads():
        conversion.write(folder, found, costs, model=name, budget=options.kv_budget)
        print(found.summary())


def _request(options):
    from mlx_optiq_ext import weights

    from ..installation import sensitivity_methods

    return weights.Request(
        budget=options.budget,
        min_tps=None if options.min_tps is None else options.min_tps[0],
        chip=None if options.min_tps is None else options.min_tps[1],
        plan_file=options.plan,
        bits=options.bits,
        group_sizes=options.group_sizes,
        calibration=options.calibration,
        method=options.sensitivity or "taylor",
        methods=sensitivity_methods(),
        refine=bool(options.refine or options.distill),
        distill=bool(options.distill),
        protect=bool(options.protect),
    )


PATCHES = (
    Patch(
        "mlx_lm.convert:convert",
        feature="weights",
        why="measures the model and plans the precisions before stock quantizes",
        upstream="none: stock takes a predicate, but only from code",
        wrapper=convert,
        uses=(
            *of("mlx_lm.models.cache", "make_prompt_cache"),
            *of("mlx_lm.quant.utils", "load_data", "'.cache/mlx-lm/calibration_v5.txt'"),
            *of("mlx_lm.utils", "hf_repo_to_path", "upload_to_hub"),
        ),
    ),
)
