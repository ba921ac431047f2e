"""``--optiq-adapter`` and its companions of the server, and what is refused before it starts."""

from pathlib import Path

from mlx_optiq_ext.errors import InputError


def add_arguments(group):
    group.add_argument(
        "--optiq-adapter",
        metavar="NAME=PATH_OR_REPO",
        action="append",
        help="Serve a LoRA adapter beside the base model; requests pick it by its name as their "
        "model. May be given many times.",
    )
    group.add_argument(
        "--optiq-max-adapters",
        metavar="N",
        type=int,
        help="Mount at most so many adapters at a time; idle ones make room. Default: all.",
    )
    group.add_argument(
        "--optiq-allow-adapter-updates",
        action="store_const",
        const=True,
        help="Let clients load and unload adapters at /v1/load_lora_adapter and "
        "/v1/unload_lora_adapter.",
    )
    group.add_argument(
        "--optiq-adapter-dir",
        metavar="DIR",
        type=Path,
        help="The folder that clients may load adapters from.",
    )


def check(options, args):
    from ..installation import gate

    given = (
        options.adapter,
        options.max_adapters,
        options.allow_adapter_updates,
        options.adapter_dir,
    )
    if all(each is None for each in given):
        return
    gate().require("adapters")
    if args.model is None:
        raise InputError("--optiq-adapter needs the base model: name it with --model")
    if args.adapter_path is not None:
        raise InputError(
            "--adapter-path changes the base model that --optiq-adapter builds on: give that "
            "adapter a name with --optiq-adapter too"
        )
    if bool(options.allow_adapter_updates) is not (options.adapter_dir is not None):
        raise InputError(
            "--optiq-allow-adapter-updates and --optiq-adapter-dir go together: clients load "
            "adapters from that folder only"
        )
    if options.adapter_dir is not None and not options.adapter_dir.is_dir():
        raise InputError(f"--optiq-adapter-dir {options.adapter_dir}: no such folder")
    if options.max_adapters is not None and options.max_adapters < 1:
        raise InputError("--optiq-max-adapters must be 1 or more")
    options.catalogue = _catalogue(options, args.model)


def base_names(model: str) -> set[str]:
    """What requests may call the base model; /v1/models lists the last of them."""
    path = Path(model)
    return {"default_model", model, *([str(path.resolve())] if path.exists() else [])}


def _catalogue(options, model: str):
    from mlx_optiq_ext.adapters import Catalogue, Offer, check_name
    from mlx_optiq_ext.lora.forms.location import locate

    from ..installation import plugin_manager

    offers = {}
    for text in options.adapter or ():
        name, equals, source = text.partition("=")
        if not (equals and source):
            raise InputError(f"--optiq-adapter {text}: write NAME=PATH_OR_REPO")
        check_name(name)
        if name in offers:
            raise InputError(f"--optiq-adapter names {name!r} twice")
        if name in base_names(model):
            raise InputError(f"--optiq-adapter {text}: {name!r} is the base model's name")
        found = plugin_manager().hook.optiq_resolve_adapter(name=source)
        # Repositories are downloaded here, with the Hub's progress bar.
        offers[name] = Offer(name, source, locate(source if found is None else found).folder)
    return Catalogue(offers.values(), limit=options.max_adapters)
