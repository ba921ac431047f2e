"""Names of a model's modules, as files write them that were made for another form of the model."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

#: What may stand before ``layers.0`` where a checkpoint has been wrapped or unwrapped. The text
#: model of a vision-language checkpoint has each of these names somewhere.
_STEMS = (
    "model",
    "language_model.model",
    "model.language_model",
    "model.language_model.model",
    "model.text_model",
    "language_model",
    "transformer",
    "backbone",
)


def place(name: str, known: AbstractSet[str] | Mapping[str, object]) -> str | None:
    """The model's path for a name that may be written with another wrapper's prefix.

    It takes the same time for any number of known paths.

    Args:
        name: Of a module, or of its weight.
        known: The model's module paths.

    Returns:
        One of ``known``; None if none of them is meant, or several may be.
    """
    path = name.removesuffix(".weight")
    if path in known:
        return path
    tails = {path.removeprefix(f"{stem}.") for stem in _STEMS if path.startswith(f"{stem}.")}
    tails.add(path)
    candidates = {f"{stem}.{tail}" for stem in _STEMS for tail in tails} | tails
    found = [each for each in candidates if each in known]
    return found[0] if len(found) == 1 else None
