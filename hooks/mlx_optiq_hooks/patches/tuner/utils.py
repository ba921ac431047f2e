"""``mlx_lm.tuner.utils``: LoRA ranks by layer, and adapters in every form."""

from ...commands import lora as command
from ...commands import server
from ...engine import session
from ...engine.patch import Patch, bind, of


def linear_to_lora_layers(wrapped, instance, args, kwargs):
    result = wrapped(*args, **kwargs)
    run, choose = session.state(command.Run), _choose()
    request = None if run is None else run.request
    if request is None and choose is None:
        return result
    from mlx_optiq_ext import distributed, lora

    call = bind(wrapped, args, kwargs)
    model, config = call["model"], call["config"]
    if run is not None and request is not None:
        run.checkpoint = lora.prepare(model, config, request, choose)
        # mlx-lm writes this into adapter_config.json.
        config["rank"] = run.checkpoint.widest
        if distributed.leads():
            print(lora.summary(run.checkpoint))
    elif choose is not None:
        lora.choose_ranks(model, config, choose)
    return result


def _choose():
    """A function that asks plugins for a layer's rank; None without such plugins."""
    from ...installation import gate, plugin_manager

    hook = plugin_manager().hook.optiq_lora_rank
    if not (gate().state("plugins").on and hook.get_hookimpls()):
        return None
    running = session.current()
    options = None if running is None else running.options
    return lambda path, module, rank: hook(path=path, module=module, rank=rank, options=options)


def load_adapters(wrapped, instance, args, kwargs):
    call = bind(wrapped, args, kwargs)
    if server.by_client(call["adapter_path"]):
        # Stock reads folders only, in its own form. A request must not reach the Hub or a plugin.
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext import lora

    from ...installation import gate, plugin_manager

    hook = plugin_manager().hook.optiq_resolve_adapter
    if gate().state("plugins").on and hook.get_hookimpls():
        folder = hook(name=call["adapter_path"])
        if folder is not None:
            call["adapter_path"] = str(folder)
    source, model = call["adapter_path"], call["model"]
    if session.current() is not None:
        lora.adapter_folder(source)  # refuses a missing adapter in one line
    if lora.readable_by_stock(source, lambda: lora.adaptable(model)):
        return wrapped(**call)
    return lora.attach(model, lora.read_adapter(source))


#: mlx-lm's LoRA layers, and the layers that they adapt.
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
        why="reads PEFT adapters, ranks by layer and names on the Hub",
        upstream="mlx-lm #1119 (PEFT adapters)",
        wrapper=load_adapters,
        uses=(*of("mlx_lm.utils", "load_adapters"), *LAYERS),
    ),
)
