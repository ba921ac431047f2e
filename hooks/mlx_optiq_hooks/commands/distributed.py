"""What our options mean where ``mlx.launch`` runs a command on several ranks, and what is refused.

Every rank must be told the same, so the contents of the files that an option names are compared.
"""

import hashlib
from typing import Any

from mlx_optiq_ext.errors import UnsupportedError

from ..engine import session

#: Commands whose model mlx-lm splits over the ranks.
SPLIT = ("benchmark", "chat", "server")
#: Commands that would run the whole model on each rank.
WHOLE = ("cache_prompt", "generate", "perplexity")


def check(command, options, args):
    from mlx_optiq_ext import distributed

    from ..installation import gate

    if command not in SPLIT + WHOLE or distributed.size() == 1:
        return
    if command in WHOLE:
        raise UnsupportedError(
            f"mlx_lm.{command} does not split a model: each of the {distributed.size()} ranks "
            "would run all of it: use mlx_lm.chat, mlx_lm.server, mlx_lm.benchmark or one process"
        )
    gate().require("sharded")
    if command == "server":
        _check_server(options, args)
    compare(**_facts(options))


def _check_server(options: Any, args: Any) -> None:
    if args.draft_model is not None:
        raise UnsupportedError("mlx-lm takes no --draft-model on several ranks: leave it out")
    if args.adapter_path is not None:
        raise UnsupportedError(
            "mlx-lm takes no --adapter-path on several ranks: serve it with --optiq-adapter "
            "NAME=PATH_OR_REPO"
        )
    if options.allow_adapter_updates is not None:
        raise UnsupportedError(
            "--optiq-allow-adapter-updates works in one process only: on several ranks every "
            "adapter is named with --optiq-adapter when the server starts"
        )
    if options.max_adapters is not None and options.max_adapters < len(options.adapter or ()):
        raise UnsupportedError(
            f"--optiq-max-adapters {options.max_adapters} would mount adapters while the server "
            "runs, which works in one process only: leave it out on several ranks"
        )


def _facts(options: Any) -> dict[str, str]:
    """What an option's files hold, by what it is called."""
    found = {}
    plan = getattr(options, "kv_plan", None)
    if plan is not None:
        layers = repr((sorted(plan.layers.items()), plan.everywhere))
        found["KV plan (kv_config.json)"] = hashlib.sha256(layers.encode()).hexdigest()[:12]
    catalogue = getattr(options, "catalogue", None)
    if catalogue is not None:
        from mlx_optiq_ext.lora.forms.location import digest

        for offer in catalogue.offers():
            found[f"files of adapter {offer.name}"] = digest(offer.folder)
    return found


def compare(**facts: Any) -> None:
    """Have `Parser` compare facts over the ranks together with the command line."""
    running = session.running()
    if running is not None:
        running.results.setdefault("facts", {}).update(facts)
