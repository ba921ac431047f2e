"""mlx-lm's multimodal models: one row for each kind of checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MODAL_WORDS = frozenset(
    {
        "audio",
        "boa",
        "boi",
        "eoa",
        "eoi",
        "image",
        "images",
        "img",
        "media",
        "mm",
        "modal",
        "multimodal",
        "projector",
        "speech",
        "video",
        "videos",
        "vision",
        "visual",
    }
)


@dataclass(frozen=True)
class Family:
    """One kind of multimodal checkpoint.

    Attributes:
        wrapper: ``model_type`` of its config.json.
        text: ``model_type`` by which mlx-lm loads the text model; the wrapper's own if mlx-lm has
            no separate text class.
        architecture: Name of the text model in ``architectures``.
        prefix: Prefix of the text model's parameters in the wrapper.
        inner: ``model_type`` of the ``text_config`` that this row is for; None for any other.
    """

    wrapper: str
    text: str
    architecture: str
    prefix: str = ""
    inner: str | None = None

    @property
    def unwraps(self) -> bool:
        """Whether the text model is another class than the wrapper's."""
        return self.text != self.wrapper


def _unwrapped(wrapper: str, text: str, architecture: str, inner: str | None = None) -> Family:
    return Family(wrapper, text, architecture, prefix="language_model.", inner=inner)


#: Sources: mlx_lm/models/<wrapper>.py names the text class that it builds; the architectures are
#: those of transformers. MODEL_REMAPPING turns "mistral" into llama. Kimi's text_config is a
#: kimi_k2, which mlx-lm maps to deepseek_v3 but transformers cannot read without remote code.
FAMILIES = (
    _unwrapped("gemma3", "gemma3_text", "Gemma3ForCausalLM"),
    _unwrapped("gemma4", "gemma4_text", "Gemma4ForCausalLM"),
    _unwrapped("gemma4_unified", "gemma4_text", "Gemma4ForCausalLM"),
    _unwrapped("kimi_k25", "deepseek_v3", "DeepseekV3ForCausalLM"),
    _unwrapped("kimi_vl", "deepseek_v3", "DeepseekV3ForCausalLM"),
    _unwrapped("lfm2-vl", "lfm2", "Lfm2ForCausalLM"),
    _unwrapped("llava", "mistral", "MistralForCausalLM"),
    _unwrapped("llava", "llama", "LlamaForCausalLM", inner="llama"),
    _unwrapped("mistral3", "mistral", "MistralForCausalLM"),
    _unwrapped("mistral3", "ministral3", "Ministral3ForCausalLM", inner="ministral3"),
    _unwrapped("mistral3", "mistral4", "Mistral4ForCausalLM", inner="mistral4"),
    _unwrapped("pixtral", "mistral", "MistralForCausalLM"),
    _unwrapped("qwen2_5_vl", "qwen2", "Qwen2ForCausalLM"),
    _unwrapped("qwen2_vl", "qwen2", "Qwen2ForCausalLM"),
    _unwrapped("qwen3_vl", "qwen3", "Qwen3ForCausalLM"),
    _unwrapped("qwen3_vl_moe", "qwen3_moe", "Qwen3MoeForCausalLM"),
    # mlx-lm has no other class for these: llama4_text is another model, without experts.
    Family("deepseek_v41", "deepseek_v41", "DeepseekV41ForCausalLM"),
    Family("gemma3n", "gemma3n", "Gemma3nForCausalLM"),
    Family("kimi_k3", "kimi_k3", "KimiK3ForCausalLM"),
    Family("llama4", "llama4", "Llama4ForCausalLM"),
    Family("minimax_m3_vl", "minimax_m3_vl", "MiniMaxM3ForCausalLM"),
    Family("muse_glimmer", "muse_glimmer", "MuseGlimmerForCausalLM"),
    Family("muse_spark", "muse_spark", "MuseSparkForCausalLM"),
    Family("qwen3_5", "qwen3_5", "Qwen3_5ForCausalLM"),
    Family("qwen3_5_moe", "qwen3_5_moe", "Qwen3_5MoeForCausalLM"),
)


def find(config: Mapping[str, Any]) -> Family | None:
    """The row for a config.json, or None if no row is for it."""
    if "model_file" in config:
        return None  # the checkpoint contains its own model class
    inner = (config.get("text_config") or {}).get("model_type")
    rows = [f for f in FAMILIES if f.wrapper == config.get("model_type")]
    exact = [f for f in rows if f.inner is not None and f.inner == inner]
    return next(iter(exact + [f for f in rows if f.inner is None]), None)


def is_modal(key: str) -> bool:
    """Whether a config.json key is about images, video or sound."""
    return not _MODAL_WORDS.isdisjoint(key.split("_"))


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a tower for images, video or sound."""
    return any(is_modal(key) and isinstance(value, dict) and value for key, value in config.items())
