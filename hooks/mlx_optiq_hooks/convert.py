"""``mlx_lm.convert``: plans the packings before stock converts with them."""

from pathlib import Path

from . import session
from .patch import Patch, bind


def convert(wrapped, instance, args, kwargs):
    running = session.current()
    if running is None or running.options is None or running.options.budget is None:
        return wrapped(*args, **kwargs)
    from mlx_lm.utils import upload_to_hub

    from mlx_optiq_ext import files, modalities, weights

    from . import gate, sensitivity_methods

    gate().require("weights")
    options, call = running.options, bind(wrapped, args, kwargs)
    target, upload = Path(call["mlx_path"]), call.pop("upload_repo", None)
    name = options.sensitivity or "taylor"
    with files.staged(target) as folder:
        plan = weights.plan_folder(
            call["hf_path"],
            options.budget,
            dtype=call.get("dtype"),
            revision=call.get("revision"),
            trust_remote_code=call.get("trust_remote_code", False),
            bits=options.bits,
            group_sizes=options.group_sizes,
            calibration=options.calibration,
            method=sensitivity_methods()[name],
            method_name=name,
        )
        running.results["plan"] = plan
        call.update(
            mlx_path=str(folder),
            quantize=True,
            q_group_size=plan.default.group_size,
            q_bits=plan.default.bits,
        )
        wrapped(**call)
        report = running.results.get("modalities")
        if report is not None:
            modalities.remove_processor_files(folder)
        plan.save(folder, post_processing=[report.entry()] if report else [])
        weights.check_written(folder, plan)
    if report is not None:
        print(report.summary())
    print(plan.summary())
    if upload is not None:
        upload_to_hub(str(target), upload)


PATCHES = (
    Patch(
        "mlx_lm.convert:convert",
        feature="weights",
        why="measures the model and plans the packings before stock quantizes",
        upstream="none: stock takes a predicate, but only from code",
        wrapper=convert,
    ),
)
