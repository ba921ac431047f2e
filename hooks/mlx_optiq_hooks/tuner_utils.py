"""``mlx_lm.tuner.utils``: lets plugins choose LoRA ranks and resolve adapter names."""

from . import session
from .patch import Patch, bind


def linear_to_lora_layers(wrapped, instance, args, kwargs):
    from mlx.utils import tree_unflatten

    from . import plugin_manager

    result = wrapped(*args, **kwargs)
    hook = plugin_manager().hook.optiq_lora_rank
    if not hook.get_hookimpls():
        return result
    call, running = bind(wrapped, args, kwargs), session.current()
    model, config = call["model"], call["config"]
    changed = []
    for path, module in model.named_modules():
        base = getattr(module, "linear", None) or getattr(module, "embedding", None)
        if base is None or not hasattr(module, "lora_a"):
            continue
        rank = hook(
            path=path,
            module=base,
            rank=config["rank"],
            options=running.options if running else None,
        )
        if rank is not None and rank != config["rank"]:
            dropout = config["dropout"]
            again = type(module).from_base(base, r=rank, scale=config["scale"], dropout=dropout)
            changed.append((path, again))
    if changed:
        model.update_modules(tree_unflatten(changed))
    return result


def load_adapters(wrapped, instance, args, kwargs):
    from . import plugin_manager

    hook = plugin_manager().hook.optiq_resolve_adapter
    if not hook.get_hookimpls():
        return wrapped(*args, **kwargs)
    call = bind(wrapped, args, kwargs)
    folder = hook(name=call["adapter_path"])
    if folder is not None:
        call["adapter_path"] = str(folder)
    return wrapped(**call)


PATCHES = (
    Patch(
        "mlx_lm.tuner.utils:linear_to_lora_layers",
        feature="plugins",
        why="asks plugins for the rank of each layer",
        upstream="none: stock has one rank for all layers",
        wrapper=linear_to_lora_layers,
    ),
    Patch(
        "mlx_lm.tuner.utils:load_adapters",
        feature="plugins",
        why="asks plugins where a named adapter is",
        upstream="mlx-lm #1578 (plugin registration)",
        wrapper=load_adapters,
    ),
)
