"""Reads an offered adapter's files, and tells whether they are still those that were loaded."""

import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import InputError
from ...lora import Adapter, read_adapter
from ...lora.forms.location import CONFIG, MLX_LM_WEIGHTS, NOTES, PEFT_WEIGHTS, locate
from ..fitted import Fitted
from .copies import AdaptersBusyError


@dataclass(frozen=True)
class Offer:
    """An adapter that a server offers.

    Attributes:
        name: The name by which requests select it.
        source: The folder or Hub repository that the user named.
        folder: The folder with its files; links to it are followed now and never again.
        closed: Whether its files may be no links, because clients may have put them there.
    """

    name: str
    source: str
    folder: Path
    closed: bool = False

    def __post_init__(self):
        object.__setattr__(self, "folder", self.folder.resolve())


@dataclass(frozen=True)
class Pin:
    """What an adapter was read from.

    Attributes:
        folder: Device and inode of its folder.
        files: Device, inode, size and times of its files, and when a closed folder was changed.
        version: Digest of its tensors.
    """

    folder: tuple[int, int]
    files: tuple[tuple[int, ...] | None, ...] = field(compare=False)
    version: str = ""


@dataclass(frozen=True)
class Caps:
    """How large an adapter may be.

    Attributes:
        rank: Largest LoRA rank of a layer.
        nbytes: Most bytes of the file with its weights; None for any number.
    """

    rank: int = 256
    nbytes: int | None = None

    def check_file(self, offer: Offer) -> None:
        """Refuse a file that is too large, before it is read.

        Raises:
            InputError: It is too large, or there is none.
        """
        size = locate(offer.folder).weights.stat().st_size
        if self.nbytes is not None and size > self.nbytes:
            raise InputError(
                f"adapter {offer.name!r} takes {size:,} bytes, and at most {self.nbytes:,} are "
                "served: raise --optiq-max-adapter-bytes, or train with a lower rank"
            )

    def check(self, offer: Offer, adapter: Adapter) -> None:
        """Refuse an adapter of a rank that is too high.

        Raises:
            InputError: It is.
        """
        path, layer = max(adapter.layers.items(), key=lambda each: each[1].rank)
        if layer.rank > self.rank:
            raise InputError(
                f"adapter {offer.name!r} has rank {layer.rank} at {path}, and at most {self.rank} "
                "is served: raise --optiq-max-adapter-rank, or train with a lower rank"
            )


class Reader:
    """Reads one adapter at a time.

    Args:
        caps: How large it may be.

    Attributes:
        most: Tensors that an adapter of the model has at most; None for any number.
    """

    def __init__(self, caps: Caps):
        self._caps = caps
        self.most: int | None = None
        self._reading = threading.Lock()
        # MLX keeps a stream, and a thread, for every thread that has ever computed. Requests have
        # threads of their own, so that they do not read themselves.
        self._thread = ThreadPoolExecutor(1, "mlx-optiq-ext-reader")

    def read(
        self,
        offer: Offer,
        fit: Callable[[Adapter], Fitted],
        *,
        pin: Pin | None = None,
        seconds: float = -1,
        apart: bool = False,
    ) -> tuple[Fitted, Pin]:
        """Read an offered adapter, in any thread.

        Args:
            offer: The adapter.
            fit: Checks it against the model.
            pin: What it was read from before; None if it is to be read as it is now.
            seconds: How long to wait for other adapters to be read; -1 for as long as it takes.
            apart: Whether to read in the reader's own thread, because this one soon ends.

        Returns:
            The adapter, and what it was read from.

        Raises:
            AdaptersBusyError: Others were still being read.
            InputError: Its files are missing, damaged, changed, too large, or for another model.
            UnsupportedError: It is DoRA.
        """
        if not self._reading.acquire(timeout=seconds):
            raise AdaptersBusyError("other adapters are still being read: try again")
        try:
            if apart:
                return self._thread.submit(self._read, offer, fit, pin).result()
            return self._read(offer, fit, pin)
        finally:
            self._reading.release()

    def _read(
        self, offer: Offer, fit: Callable[[Adapter], Fitted], pin: Pin | None
    ) -> tuple[Fitted, Pin]:
        seen = _look(offer)
        if pin is not None and seen.folder != pin.folder:
            raise _changed(offer)
        self._caps.check_file(offer)
        adapter = read_adapter(offer.folder, self.most)
        self._caps.check(offer, adapter)
        fitted = fit(adapter)
        if _look(offer).files != seen.files:
            raise InputError(f"adapter {offer.name!r}: its files changed while they were read")
        if pin is not None and fitted.version != pin.version:
            raise _changed(offer)
        return fitted, Pin(seen.folder, seen.files, fitted.version)


def _changed(offer: Offer) -> InputError:
    return InputError(
        f"adapter {offer.name!r}: its files are no longer those that were loaded: load it again "
        "with load_inplace, or start the server anew"
    )


def _look(offer: Offer) -> Pin:
    """The folder and its files as they are now, without reading them."""
    try:
        if offer.folder.resolve(strict=True) != offer.folder or not offer.folder.is_dir():
            raise _changed(offer)
        folder = offer.folder.stat()
        files = tuple(_file(offer, name) for name in (CONFIG, NOTES, MLX_LM_WEIGHTS, PEFT_WEIGHTS))
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"adapter {offer.name!r}: its folder is gone or cannot be read: put it back, or unload "
            "the adapter"
        ) from error
    # A folder that made way for a link and came back has the same files, but was changed.
    changed = (folder.st_ctime_ns,) if offer.closed else None
    return Pin((folder.st_dev, folder.st_ino), (*files, changed))


def _file(offer: Offer, name: str) -> tuple[int, ...] | None:
    path = offer.folder / name
    try:
        found = path.lstat() if offer.closed else path.stat()
    except FileNotFoundError:
        return None
    if offer.closed and not stat.S_ISREG(found.st_mode):
        raise InputError(
            f"adapter {offer.name!r}: {name} is a link or no regular file: copy the file itself "
            "into the adapter's folder"
        )
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
