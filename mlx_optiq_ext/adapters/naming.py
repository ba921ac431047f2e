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
    whole = [str(path.resolve())] if path.exists() else []
    return {DEFAULT_MODEL, model, public_name(model), *whole}


def public_name(source: str) -> str:
    """A model's or adapter's name as clients see it: of a folder here only its last part.

    Args:
        source: A folder, or a repository on the Hub.
    """
    path = Path(source)
    return path.resolve().name or DEFAULT_MODEL if path.is_absolute() or path.exists() else source


def check_name(name: str) -> None:
    """Refuse a name that requests cannot use.

    Raises:
        InputError: It is empty, too long, or has characters beyond those of a file name.
    """
    if not 0 < len(name) <= 128 or not all(
        c.isascii() and (c.isalnum() or c in "._-:/@+") for c in name
    ):
        raise InputError(
            f"adapter name {shortened(name)}: use up to 128 letters, digits and . _ - : / @ +"
        )
