"""``mlx_lm.tuner.utils``: LoRA ranks of their own, and adapters in every form."""

from ...engine import session
from ...engine.patch import Patch, bind, of


def linear_to_lora_layers(wrapped, instance, args, kwargs):
    result = wrapped(*args, **kwargs)
    call, running = bind(wrapped, args, kwargs), session.current()
    request = running.results.get("training") if running is not None else None
    if running is None or request is None:
        _ask_plugins(call["model"], call["config"], running)
        return result
    from mlx_optiq_ext import distributed, lora

    config = call["config"]
    checkpoint = lora.prepare(call["model"], config, request, _plugin_rank(running))
    running.results["checkpoint"] = checkpoint
    # mlx-lm writes this into adapter_config.json.
    config["rank"] = checkpoint.widest
    if distributed.leads():
        print(lora.summary(checkpoint))
    return result


def _plugin_rank(running):
    """Asks plugins for a layer's rank; None if there is none to ask."""
    from ...installation import gate, plugin_manager

    hook = plugin_manager().hook.optiq_lora_rank
    if not (gate().state("plugins").on and hook.get_hookimpls()):
        return None
    options = running.options if running else None
    return lambda path, module, rank: hook(path=path, module=module, rank=rank, options=options)


def _ask_plugins(model, config, running):
    choose = _plugin_rank(running)
    if choose is None:
        return
    from mlx.utils import tree_unflatten

    changed = []
    for path, module in model.named_modules():
        base = getattr(module, "linear", None) or getattr(module, "embedding", None)
        if base is None or not hasattr(module, "lora_a"):
            continue
        rank = choose(path, base, config["rank"])
        if rank is not None and rank != config["rank"]:
            dropout = config["dropout"]
            again = type(module).from_base(base, r=rank, scale=config["scale"], dropout=dropout)
            changed.append((path, again))
    if changed:
        model.update_modules(tree_unflatten(changed))


def load_adapters(wrapped, instance, args, kwargs):
    from mlx_optiq_ext import lora

    from ...installation import gate, plugin_manager

    call = bind(wrapped, args, kwargs)
    hook = plugin_manager().hook.optiq_resolve_adapter
    if gate().state("plugins").on and hook.get_hookimpls():
        folder = hook(name=call["adapter_path"])
        if folder is not None:
            call["adapter_path"] = str(folder)
    source = call["adapter_path"]
    if lora.readable_by_stock(source):
        return wrapped(**call)
    return lora.attach(call["model"], lora.read_adapter(source))


#: LoRA layers, and what they adapt.
LAYERS = (
    *(
        name
        for module, layer, base in (
            ("lora", "LoRALinear", "linear"),
            ("lora", "LoRAEmbedding", "embedding"),
            ("lora", "LoRASwitchLinear", "linear"),
            ("dora", "DoRALinear", "linear"),
            ("dora", "DoRAEmbedding", "embedding"),
        )
        for name in of(
            f"mlx_lm.tuner.{module}",
            *(f"{layer}.{part}" for part in (base, "from_base", "lora_a", "lora_b", "scale")),
        )
    ),
    *of("mlx_lm.tuner.dora", "DoRALinear.m", "DoRAEmbedding.m"),
    *of("mlx_lm.models.switch_layers", "SwitchLinear", "QuantizedSwitchLinear"),
)

PATCHES = (
    Patch(
        "mlx_lm.tuner.utils:linear_to_lora_layers",
        feature="lora",
        why="gives each layer the rank that was asked for, or that a plugin names",
        upstream="none: stock has one rank for all layers",
        wrapper=linear_to_lora_layers,
        uses=LAYERS,
    ),
    Patch(
        "mlx_lm.tuner.utils:load_adapters",
        feature="lora",
        why="reads PEFT adapters, ranks of their own and names on the Hub",
        upstream="mlx-lm #1119 (PEFT adapters)",
        wrapper=load_adapters,
        uses=(*of("mlx_lm.utils", "load_adapters"), *LAYERS),
    ),
)
