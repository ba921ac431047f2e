"""``--optiq-kv`` of the commands that run a model, and what is refused before it is loaded."""

import json
import sys
from pathlib import Path
from typing import Any

from mlx_optiq_ext.errors import InputError

from ..engine import session

COMMANDS = (
    "benchmark",
    "cache_prompt",
    "chat",
    "evaluate",
    "generate",
    "perplexity",
    "server",
)


def add_arguments(group):
    group.add_argument(
        "--optiq-kv",
        metavar="PLAN",
        help="Keep each layer's keys and values at their own precision: a kv_config.json, 'auto' "
        "for the one beside the model, or a width for all such as 4, k8v4 or k8v4g32.",
    )


def check(options, args):
    from ..installation import gate

    if getattr(options, "kv", None) is None:
        return
    gate().require("kv")
    if getattr(args, "kv_bits", None) is not None:
        raise InputError(
            "--optiq-kv and --kv-bits both decide how to keep keys and values: leave one out"
        )
    model = getattr(args, "model", None)
    plan = resolve(options.kv, model)
    count = _layer_count(model)
    if count is not None:
        from mlx_optiq_ext.kv.plan import check_layers

        check_layers(plan, count)
    options.kv_plan = plan


def mounted(model: Any) -> bool:
    """Whether a model has a KV plan; the first model that a command runs is given its plan."""
    running = session.current()
    plan = session.kv_plan(running)
    if plan is None and "mlx_optiq_ext.kv" not in sys.modules:
        return False  # unused: nothing is imported for it
    from mlx_optiq_ext import kv

    if kv.mounted_on(model) is not None:
        return True
    if running is None or plan is None or running.results.get("kv"):
        return False  # such as a draft model
    mount(model, running)
    return True


def mount(model: Any, running: session.Session) -> None:
    """Give a model the KV plan of the running command."""
    from mlx_optiq_ext import kv

    from ..installation import gate

    plan = session.kv_plan(running)
    kv.mount(model, plan, mergeable=gate().state("kv_batched").on)
    running.results["kv"] = True


def resolve(text: str, model: str | None) -> Any:
    """The plan that ``--optiq-kv`` means."""
    from mlx_optiq_ext.kv import parse_spec, read_plan
    from mlx_optiq_ext.kv.plan import FILE

    spec = parse_spec(text)
    if spec is not None:
        return spec
    if text != "auto":
        if not Path(text).exists():
            raise InputError(
                f"--optiq-kv {text}: no such file, and no width such as 4, k8v4 or k8v4g32"
            )
        return read_plan(Path(text))
    if model is None:
        raise InputError("--optiq-kv auto looks beside the model: name it with --model")
    path = Path(model) / FILE
    if Path(model).exists():
        if not path.exists():
            raise InputError(
                f"{model} has no {FILE}: write one with mlx_lm.convert --optiq-kv-budget, or name "
                "a width such as --optiq-kv 4"
            )
        return read_plan(path)
    return read_plan(_downloaded(model, FILE))


def _downloaded(repo: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        raise InputError(
            f"{repo} has no {name} that could be read ({type(error).__name__}): name a file or a "
            "width such as --optiq-kv 4"
        ) from error


def _layer_count(model: str | None) -> int | None:
    """Decoder layers by a local model's config; None if it is not here or does not say."""
    path = Path(model or "") / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    found = config.get(
        "num_hidden_layers", (config.get("text_config") or {}).get("num_hidden_layers")
    )
    return found if isinstance(found, int) else None
