"""Checks of ``mlx_lm.convert`` before anything is loaded."""

from pathlib import Path

from mlx_optiq_ext import files, plugins
from mlx_optiq_ext.errors import InputError

from ...engine import session
from ...engine.command import Run as Instead
from ...engine.options import given, read, spelled
from . import yolo
from .options import Options
from .run import Run

#: Options that say how to choose a plan; one of them at most.
CHOOSING = ("budget", "min_tps", "max_kl", "plan")

#: Options for planning the KV cache.
KV = ("kv_budget", "kv_only", "calibration")

#: Options that do not go with a saved plan, which has decided them.
DECIDED = ("budget", "min_tps", "max_kl", "bits", "group_sizes", "pin", "sensitivity", "protect")


def check(command, parsed, args) -> Instead | None:
    """Refuse unusable options; returns what runs in place of the conversion, if anything."""
    options = read(Options, parsed)
    if options.model_type is not None:
        return yolo.check(options, args)
    kv = options.kv_budget is not None or options.kv_only
    if kv:
        _check_kv(options, args)
    if not kv or set(given(options)) - set(KV):
        _check_weights(options, args)
    if given(options):  # otherwise only options of plugins were given
        _check_places(options, args)
    session.keep(Run(options))
    return None


def _check_places(options: Options, args) -> None:
    """Refuse a source that is not a model, and an output that exists already."""
    from mlx_optiq_ext.model.source import check_source

    if not options.kv_only and not options.forecast:
        files.check_new(Path(args.mlx_path))
    if args.hf_path is None:
        raise InputError("there is nothing to convert: name a folder or repository with --hf-path")
    check_source(args.hf_path, getattr(args, "revision", None))


def _check_kv(options: Options, args) -> None:
    from mlx_optiq_ext.planning.texts import read_texts

    from ...installation import gate

    gate().require("kv")
    gate().require("weights")  # whose wrapper of convert() makes the plan
    if options.kv_budget is None:
        raise InputError("--optiq-kv-only needs --optiq-kv-budget, such as --optiq-kv-budget 4.5")
    if options.kv_only:
        other = [name for name in given(options) if name not in KV]
        if other:
            raise InputError(f"--optiq-kv-only converts nothing: leave {spelled(other)} out")
        if not (Path(args.hf_path) / "config.json").exists():
            raise InputError(
                f"--optiq-kv-only writes beside an MLX model: {args.hf_path} is not a folder with "
                "one"
            )
    if options.calibration is not None:
        read_texts(options.calibration)


def _check_weights(options: Options, args) -> None:
    from mlx_optiq_ext.planning.texts import read_texts
    from mlx_optiq_ext.weights.plan_file import read_entries
    from mlx_optiq_ext.weights.report import check_target

    from ...installation import gate

    gate().require("weights")
    names = [name for name in given(options) if not name.startswith("kv_")]
    chosen = [name for name in CHOOSING if name in names]
    if not chosen:
        if names:
            raise InputError(
                f"{spelled(names)} needs --optiq-budget, such as --optiq-budget 4.5, "
                "--optiq-min-tps, --optiq-max-kl or --optiq-plan"
            )
        return  # only options of plugins were given
    if options.forecast:
        _check_forecast(options, args)
    sizes = [name for name in CHOOSING if name in names and name != "plan"]
    if len(sizes) > 1:
        two = " and ".join(spelled([name]) for name in sizes[:2])
        raise InputError(f"{two} both decide the size: leave one of them out")
    if options.min_tps is not None:
        from mlx_optiq_ext.latency import find_chip

        gate().require("latency")
        find_chip(options.min_tps.chip)
    if options.plan is None:
        plugins.check("optiq_sensitivity_methods")
    else:
        clash = sorted(set(names) & set(DECIDED))
        if clash:
            raise InputError(
                f"--optiq-plan decides already what {spelled(clash)} would: leave one of them out"
            )
        if options.report is not None:
            raise InputError(
                "--optiq-report shows measurements and needs --optiq-budget: leave out --optiq-plan"
            )
        read_entries(options.plan)
    if options.text_only:
        gate().require("modalities")
    _check_stock(chosen, args)
    if options.calibration is not None:
        read_texts(options.calibration)
    if options.report is not None:
        check_target(options.report, drawing=options.forecast)


def _check_forecast(options: Options, args) -> None:
    """Refuse what only a conversion can do."""
    asked = "--optiq-dry-run" if options.dry_run else "a list of budgets"
    if options.budget is None:
        raise InputError(
            "--optiq-dry-run needs --optiq-budget, one or several, such as --optiq-budget 4.5"
        )
    if options.kv_budget is not None:
        raise InputError(f"{asked} writes nothing: leave out --optiq-kv-budget")
    if getattr(args, "upload_repo", None) is not None:
        raise InputError(f"{asked} writes nothing: leave out --upload-repo")


def _check_stock(chosen: list[str], args) -> None:
    """Refuse stock options that quantize."""
    stock = {
        "--quant-predicate": args.quant_predicate is not None,
        "--q-bits": args.q_bits is not None,
        "--q-group-size": args.q_group_size is not None,
        f"--q-mode {args.q_mode}": args.q_mode != "affine",
        "--dequantize": args.dequantize,
    }
    for name, used in stock.items():
        if used:
            raise InputError(
                f"{spelled(chosen)} and {name} both decide how to quantize: leave one of them out"
            )
