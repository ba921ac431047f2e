"""One stable function for each symbol that moved between releases of mlx-lm or MLX.

The only place outside the verdicts that asks which release is installed. mlx-lm and MLX are
imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def load(
    path_or_repo: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """``mlx_lm.load``, which takes ``trust_remote_code`` for the model's code from 0.32.0 on.

    Before that release only the tokenizer can bring code.

    Args:
        path_or_repo: A folder or a Hub repository.
        revision: Revision of the repository.
        trust_remote_code: Whether code that comes with model or tokenizer may run.
        options: Other options of ``mlx_lm.load``.

    Returns:
        Model and tokenizer, and the config with ``return_config=True``.
    """
    import mlx_lm

    if "trust_remote_code" in _parameters(mlx_lm.load):
        options["trust_remote_code"] = trust_remote_code
    tokenizer = {"trust_remote_code": trust_remote_code}
    return mlx_lm.load(path_or_repo, tokenizer_config=tokenizer, revision=revision, **options)


def generation_stream(call: Mapping[str, Any]) -> Any:
    """The stream on which a call of mlx-lm generates.

    From 0.32.0 on the server hands it over; before, all of a process share one.

    Args:
        call: The call's arguments by name.
    """
    if "stream" in call:
        return call["stream"]
    from mlx_lm.generate import generation_stream

    return generation_stream


def device_info() -> dict[str, Any]:
    """MLX's description of the default device; older releases have the function in ``mx.metal``.

    Raises:
        RuntimeError: Such an older release runs without Metal.
    """
    import mlx.core as mx

    info: Any = getattr(mx, "device_info", None) or mx.metal.device_info
    return dict(info())


def kernel_compiler(platform: str) -> Callable[..., Any] | None:
    """``mx.fast.metal_kernel`` or ``mx.fast.cuda_kernel``.

    Args:
        platform: ``"metal"`` or ``"cuda"``.

    Returns:
        The function; None if this MLX has none, or for CUDA does not say which GPU there is.
    """
    import mlx.core as mx

    if platform == "cuda" and not hasattr(mx, "device_info"):
        return None
    return getattr(mx.fast, f"{platform}_kernel", None)


def cache_has_meta_state(cache: Any) -> bool:
    """Whether a prompt cache saves settings apart from its arrays, as before 0.32.0."""
    return hasattr(cache, "meta_state")


def prompt_cache_bytes(cache: Any) -> int | None:
    """Bytes in mlx-lm's ``LRUPromptCache``; None before 0.31.0, where it does not count them."""
    return getattr(cache, "nbytes", None)


def model_arguments(module: Any) -> dict[str, bool]:
    """The config keys that a model module of mlx-lm reads.

    Args:
        module: For example ``mlx_lm.models.qwen3``.

    Returns:
        Key to whether it must be there, of the module's ``ModelArgs``.
    """
    parameters = _parameters(module.ModelArgs)
    return {name: each.default is each.empty for name, each in parameters.items()}


def _parameters(function: Any) -> Mapping[str, Any]:
    import inspect

    return inspect.signature(function).parameters
