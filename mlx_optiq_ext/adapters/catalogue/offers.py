"""Adapters that a server is started with."""

from collections.abc import Callable, Iterable
from pathlib import Path

from ...errors import InputError
from ...lora.forms.location import locate
from ..naming import base_names, check_name
from .reading import Offer


def _itself(source: str) -> str:
    return source


def read_offers(
    texts: Iterable[str], base: str, resolve: Callable[[str], str | Path] = _itself
) -> list[Offer]:
    """Adapters as ``NAME=PATH_OR_REPO``; repositories are downloaded unless they are cached.

    Args:
        texts: One for each adapter.
        base: The base model's folder or name, which no adapter may bear.
        resolve: Maps a path or repository to the one to read.

    Raises:
        InputError: A text or name is wrong, a name is taken, or there is no such adapter.
    """
    offers: dict[str, Offer] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not (equals and source):
            raise InputError(f"--optiq-adapter {text}: write NAME=PATH_OR_REPO")
        check_name(name)
        if name in offers:
            raise InputError(f"--optiq-adapter names {name!r} twice")
        if name in base_names(base):
            raise InputError(f"--optiq-adapter {text}: {name!r} is the base model's name")
        offers[name] = Offer(name, source, locate(resolve(source)).folder)
    return list(offers.values())
