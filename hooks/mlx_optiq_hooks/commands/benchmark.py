"""``mlx_lm.benchmark``: ``--optiq-kv``, and predicted speed without loading weights."""

from dataclasses import dataclass
from pathlib import Path

from mlx_optiq_ext.errors import InputError

from ..engine.command import Run
from ..engine.options import read
from . import kv

#: Title of a group in the help -> its options.
GROUPS = {"prediction": ("predict", "predict_plot", "calibrate_chip")}


@dataclass(frozen=True)
class Options:
    """Options of the command line; None, or False, for those that were not given."""

    predict: str | None = None
    predict_plot: Path | None = None
    calibrate_chip: bool = False


def add_arguments(group):
    """Add the options to an argparse group."""
    kv.add_arguments(group)
    group.add_argument(
        "--optiq-predict",
        metavar="CHIP",
        help="Predict speed and memory instead of measuring them: a chip such as m4-max-40, 'auto' "
        "for this machine, a JSON file that describes one, or 'list' for all chips.",
    )
    group.add_argument(
        "--optiq-predict-plot",
        metavar="FILE.svg",
        type=Path,
        help="Also plot predicted tokens per second against context. Needs --optiq-predict.",
    )
    group.add_argument(
        "--optiq-calibrate-chip",
        action="store_true",
        default=None,
        help="Measure this machine for --optiq-predict auto: products by dtype and quantization, "
        "attention, norms and launch overhead. About a minute.",
    )


def check(command, parsed, args) -> Run | None:
    """Refuse unusable options; returns what runs in place of the benchmark, if anything."""
    from ..installation import gate

    kv.check(command, parsed, args)
    options = read(Options, parsed)
    plot = options.predict_plot
    if options.predict is None and not options.calibrate_chip:
        if plot is not None:
            raise InputError("--optiq-predict-plot needs --optiq-predict, such as m4-max-40")
        return None
    gate().require("latency")
    if options.predict == "list":
        return list_chips
    if plot is not None and not plot.absolute().parent.is_dir():
        raise InputError(f"--optiq-predict-plot {plot}: there is no folder {plot.parent}")
    if options.predict not in (None, "auto"):
        from mlx_optiq_ext.latency import find_chip

        find_chip(options.predict)
    return lambda: run(options, args)


def list_chips() -> None:
    """Print the chips that can be predicted."""
    from mlx_optiq_ext.latency import words

    print(words.table())


def run(options: Options, args) -> None:
    """Calibrate this machine, predict, or both."""
    from mlx_optiq_ext import files, latency
    from mlx_optiq_ext.latency import calibration, words
    from mlx_optiq_ext.latency.chips import calibrated_path

    if options.calibrate_chip:
        print(f"[optiq] Measuring this machine: {calibration.MEASURES}", flush=True)
        measured = calibration.calibrate()
        latency.write_chip(calibrated_path(), measured)
        print(calibration.summary(measured))
        print(f"[optiq] Written to {calibrated_path()}, which --optiq-predict auto reads")
    if options.predict is None:
        return
    chip = latency.find_chip(options.predict)
    name = args.model or _default_model()
    layout = latency.read_layout(name)
    plan = kv.plan()
    workload = latency.Workload(
        args.prompt_tokens,
        args.generation_tokens,
        args.batch_size,
        getattr(args, "prefill_step_size", latency.Workload.step),
    )
    predicted = latency.predict(layout, chip, workload, kv_plan=plan)
    print(words.summary(predicted, chip, workload, name))
    if options.predict_plot is not None:
        curves = {name: words.curve(layout, chip, batch=workload.batch)}
        if plan is not None:
            curves[f"KV {plan.source}"] = words.curve(
                layout, chip, batch=workload.batch, kv_plan=plan
            )
        files.write_text(options.predict_plot, words.drawn(curves, chip))
        print(f"[optiq] Plot: {options.predict_plot}")


def _default_model() -> str:
    from mlx_lm.generate import DEFAULT_MODEL

    return DEFAULT_MODEL
