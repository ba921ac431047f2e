"""Loading a multimodal checkpoint as the text model in it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .. import files
from ..errors import InputError
from ..model.hub import CONFIG, cached_folder, find_file
from .text import Report, handed_down, to_text


class Loaded(NamedTuple):
    """The result of ``mlx_lm.load`` with the config, and a report of what was left out, or None."""

    model: Any
    tokenizer: Any
    config: dict[str, Any]
    report: Report | None


def load_text(load: Callable[..., Any], path_or_hf_repo: str, **options: Any) -> Loaded:
    """Load a checkpoint with ``mlx_lm.load`` and keep its text model only.

    Args:
        load: ``mlx_lm.load``.
        path_or_hf_repo: A folder or a Hub repository.
        options: Keyword arguments of ``load``.

    Returns:
        The text model; a text-only checkpoint is loaded unchanged.

    Raises:
        UnsupportedError: As for `to_text`.
        InputError: The checkpoint's config.json is unusable.
    """
    revision = options.get("revision")
    if not options.get("model_config"):
        options["model_config"] = handed_down(_read_config(path_or_hf_repo, revision)) or None
    model, tokenizer, config = load(path_or_hf_repo, **{**options, "return_config": True})
    text = to_text(model, config, _folder(path_or_hf_repo, revision))
    if text is None:
        return Loaded(model, tokenizer, config, None)
    return Loaded(text.model, tokenizer, text.config, text.report)


def _read_config(source: str, revision: str | None) -> dict[str, Any]:
    try:
        path = find_file(source, CONFIG, revision)
    except InputError:
        return {}  # mlx-lm is asked for the same file next, and says what is wrong
    config = files.read_json(path, files.MODEL_CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object: is it another file?")
    return config


def _folder(source: str, revision: str | None) -> Path | None:
    """The folder that mlx-lm loads from, or None if it is not in the Hub's cache."""
    try:
        return cached_folder(source, revision)
    except InputError:
        return None
