"""Several adapters for one request: all of them, or none."""

import threading
from collections.abc import Callable, Sequence

from ...errors import InputError
from ..mixture import MountedAdapter
from .copies import AdaptersBusyError


class Sets:
    """Collects the adapters of requests for several.

    A request for one adapter holds nothing while it waits. Of those for several, one at a time
    holds some while it waits for more, so that no two wait for each other.
    """

    def __init__(self):
        self._turn = threading.Lock()

    def collect(
        self,
        names: Sequence[str],
        acquire: Callable[[str], MountedAdapter],
        release: Callable[[MountedAdapter], object],
        seconds: float,
    ) -> list[MountedAdapter]:
        """Acquire adapters one after another; if one fails, none is held.

        Args:
            names: Their names.
            acquire: Waits for one; ends in bounded time.
            release: Gives one back.
            seconds: How long to wait while another request collects.

        Raises:
            AdaptersBusyError: It was still doing so.
        """
        if not self._turn.acquire(timeout=seconds):
            raise AdaptersBusyError(
                "other requests for several adapters wait for theirs: try again"
            )
        held: list[MountedAdapter] = []
        try:
            for name in names:
                held.append(acquire(name))
        except BaseException:
            for adapter in held:
                release(adapter)
            raise
        finally:
            self._turn.release()
        return held


def check_number(names: Sequence[str], limit: int | None) -> None:
    """Refuse a set that can never be mounted.

    Raises:
        InputError: It has more adapters than may be mounted.
    """
    if limit is not None and len(names) > limit:
        raise InputError(
            f"the request names {len(names)} adapters, and at most {limit} may be mounted: name "
            "fewer, or raise --optiq-max-adapters"
        )
