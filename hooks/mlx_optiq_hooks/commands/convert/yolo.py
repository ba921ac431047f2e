"""``--optiq-model-type yolo`` of ``mlx_lm.convert``: a detector in place of a language model."""

from pathlib import Path

from mlx_optiq_ext.errors import InputError

from ...engine.command import Run
from ...engine.options import given, spelled
from .options import Options

#: Options that go with ``--optiq-model-type yolo``.
TOGETHER = ("model_type", "budget", "calibration", "protect")

#: Stock options that a detector has no use for, and their defaults.
STOCK = {
    "--quantize": ("quantize", False),
    "--q-bits": ("q_bits", None),
    "--q-group-size": ("q_group_size", None),
    "--q-mode": ("q_mode", "affine"),
    "--quant-predicate": ("quant_predicate", None),
    "--dtype": ("dtype", None),
    "--dequantize": ("dequantize", False),
    "--upload-repo": ("upload_repo", None),
}


def check(options: Options, args) -> Run:
    """Refuse options that do not go with a detector; returns what runs instead of stock."""
    from mlx_optiq_ext.planning.budget import BPW
    from mlx_optiq_ext.yolo import pipeline
    from mlx_optiq_ext.yolo.network import library

    from ...installation import gate

    gate().require("yolo")
    other = sorted(set(given(options)) - set(TOGETHER))
    if other:
        raise InputError(f"--optiq-model-type yolo does not go with {spelled(other)}: leave it out")
    for flag, (name, default) in STOCK.items():
        if getattr(args, name, default) != default:
            raise InputError(f"--optiq-model-type yolo does not go with {flag}: leave it out")
    if options.budget is None:
        raise InputError("--optiq-model-type yolo needs --optiq-budget, such as --optiq-budget 5")
    budget, *more = options.budget
    if budget.kind != BPW or more:
        asked = ",".join(map(str, options.budget))
        raise InputError(
            f"--optiq-model-type yolo takes no budget of {asked}: give one number of bits per "
            "weight, such as --optiq-budget 5"
        )
    if options.calibration is None:
        raise InputError(
            "--optiq-model-type yolo needs --optiq-calibration with a folder of a few images, such "
            "as the network will see"
        )
    library()
    pipeline.check(Path(args.hf_path), Path(args.mlx_path), options.calibration, budget.amount)
    return lambda: run(options, args)


def run(options: Options, args) -> None:
    """Convert the detector."""
    from mlx_optiq_ext import yolo

    assert options.budget is not None
    assert options.calibration is not None
    result = yolo.run_yolo_pipeline(
        args.hf_path,
        args.mlx_path,
        calibration=options.calibration,
        budget=options.budget[0].amount,
        protect=options.protect,
    )
    print(result.summary())
