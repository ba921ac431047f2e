"""Many LoRA adapters on one base model, chosen by call, by thread or by row of a batch.

The base model is never changed; outside of the block it runs without an adapter::

    import mlx_lm
    from mlx_optiq_ext import adapters

    model, tokenizer = mlx_lm.load("Qwen/Qwen3-0.6B")
    adapters.mount_adapter_on_model(model, "sql", "adapters/sql")
    with adapters.AdapterActivation("sql"):
        print(mlx_lm.generate(model, tokenizer, "All users older than 30?", max_tokens=16))
"""

from .activation import AdapterActivation, activate, active
from .catalogue import Caps, Catalogue, Offer, RequestQueue, read_offers
from .layers import MountedLoRAEmbedding, MountedLoRALinear, MountedLoRASwitchLinear
from .mixture import Mixture, MountedAdapter, adapters_in, mixed
from .mounting import (
    Mounts,
    mount_adapter_on_model,
    mounts_on,
    prepare_model_for_mounted_lora,
    unmount,
)
from .naming import base_names, check_name, shortened
from .peers import counterpart
from .prompt_cache import AdapterPromptCache
from .requests import Selected, Wanted, refusal, select
from .routing import Routes
from .split import Split, note_split, split_of

__all__ = [
    "AdapterActivation",
    "AdapterPromptCache",
    "Caps",
    "Catalogue",
    "Mixture",
    "MountedAdapter",
    "MountedLoRAEmbedding",
    "MountedLoRALinear",
    "MountedLoRASwitchLinear",
    "Mounts",
    "Offer",
    "RequestQueue",
    "Routes",
    "Selected",
    "Split",
    "Wanted",
    "activate",
    "active",
    "adapters_in",
    "base_names",
    "check_name",
    "counterpart",
    "mixed",
    "mount_adapter_on_model",
    "mounts_on",
    "note_split",
    "prepare_model_for_mounted_lora",
    "read_offers",
    "refusal",
    "select",
    "shortened",
    "split_of",
    "unmount",
]
