"""Names that requests select models and adapters by."""

from pathlib import Path

from ..errors import InputError

#: What requests that name no model ask for.
DEFAULT_MODEL = "default_model"


def shortened(text: str, length: int = 64) -> str:
    """A client's text, shortened for a message."""
    return repr(text if len(text) <= length else f"{text[:length]}...")


def base_names(model: str) -> set[str]:
    """Names by which requests may select the base model; for a folder also its whole path.

    Args:
        model: The base model's folder or name.
    """
    path = Path(model)
    return {DEFAULT_MODEL, model, *([str(path.resolve())] if path.exists() else [])}


def check_name(name: str) -> None:
    """Refuse a name that requests cannot use.

    Raises:
        InputError: It is empty, too long, or has characters beyond those of a file name.
    """
    if not 0 < len(name) <= 128 or not all(
        c.isascii() and (c.isalnum() or c in "._-:/@") for c in name
    ):
        raise InputError(
            f"adapter name {shortened(name)}: use up to 128 letters, digits and . _ - : / @"
        )
