"""Reads an offered adapter's files."""

from dataclasses import dataclass
from pathlib import Path

from ...lora import Adapter, read_adapter


@dataclass(frozen=True)
class Offer:
    """An adapter that a server offers.

    Attributes:
        name: The name by which requests select it.
        source: The folder or Hub repository that the user named.
        folder: The folder with its files.
    """

    name: str
    source: str
    folder: Path


def read(offer: Offer) -> Adapter:
    """Read an offered adapter.

    Raises:
        InputError: Its files are missing or damaged.
    """
    return read_adapter(offer.folder)
