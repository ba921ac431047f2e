"""``--optiq-model-type yolo`` of ``mlx_lm.convert``: a detector in place of a language model."""

from pathlib import Path

from mlx_optiq_ext.errors import InputError

#: Options that go with it.
TOGETHER = {"model_type", "budget", "calibration", "protect"}

#: Stock options that mean something else than they do for a language model, and their defaults.
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


def add_arguments(group):
    group.add_argument(
        "--optiq-model-type",
        choices=("yolo",),
        help="What --hf-path is, if not a language model. yolo: a YOLO26 checkpoint (.pt, "
        ".safetensors or .npz); --optiq-calibration is then a folder with a few images.",
    )


def check(options, args):
    if options.model_type is None:
        return None
    from mlx_optiq_ext.yolo import pipeline
    from mlx_optiq_ext.yolo.network import library

    from ..installation import gate

    gate().require("yolo")
    other = {name for name, value in vars(options).items() if value is not None} - TOGETHER
    if other:
        names = ", ".join(f"--optiq-{name.replace('_', '-')}" for name in sorted(other))
        raise InputError(f"--optiq-model-type yolo does not go with {names}: leave it out")
    for flag, (name, default) in STOCK.items():
        if getattr(args, name, default) != default:
            raise InputError(f"--optiq-model-type yolo does not go with {flag}: leave it out")
    if options.budget is None:
        raise InputError("--optiq-model-type yolo needs --optiq-budget, such as --optiq-budget 5")
    if options.calibration is None:
        raise InputError(
            "--optiq-model-type yolo needs --optiq-calibration with a folder of a few images, such "
            "as the network will see"
        )
    library()
    pipeline.check(Path(args.hf_path), Path(args.mlx_path), options.calibration, options.budget)
    return lambda: run(options, args)


def run(options, args) -> None:
    """In place of the conversion."""
    from mlx_optiq_ext import yolo

    result = yolo.run_yolo_pipeline(
        args.hf_path,
        args.mlx_path,
        calibration=options.calibration,
        budget=options.budget,
        protect=bool(options.protect),
    )
    print(result.summary())
