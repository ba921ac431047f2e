"""Many LoRA adapters on one base model, chosen by call, by thread or by row of a batch."""

from .activation import AdapterActivation, MountedAdapter, activate, active
from .catalogue import Catalogue, Offer, check_name, shortened
from .jobs import RequestQueue
from .layers import MountedLoRAEmbedding, MountedLoRALinear, MountedLoRASwitchLinear
from .mounting import (
    Mounts,
    mount_adapter_on_model,
    mounts_on,
    prepare_model_for_mounted_lora,
    unmount,
)
from .prompt_cache import AdapterPromptCache
from .routing import Routes

__all__ = [
    "AdapterActivation",
    "AdapterPromptCache",
    "Catalogue",
    "MountedAdapter",
    "MountedLoRAEmbedding",
    "MountedLoRALinear",
    "MountedLoRASwitchLinear",
    "Mounts",
    "Offer",
    "RequestQueue",
    "Routes",
    "activate",
    "active",
    "check_name",
    "mount_adapter_on_model",
    "mounts_on",
    "prepare_model_for_mounted_lora",
    "shortened",
    "unmount",
]
