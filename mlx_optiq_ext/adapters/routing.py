"""The adapter of every row of a batch generator, by the row's ``uid``."""

from collections.abc import Iterable, Sequence
from typing import Any

from .activation import Rows, select
from .mixture import Mixture, MountedAdapter, adapters_in
from .mounting import Mounts
from .prompt_cache import SignedCache, signed


class Routes:
    """The adapters of a batch generator's rows; each stays mounted while its row is here."""

    def __init__(self, mounts: Mounts):
        self._mounts = mounts
        self._adapters: dict[int, MountedAdapter | Mixture] = {}
        # A generator has two batches: prompts and rows that generate.
        self._selections: dict[tuple[int, ...], MountedAdapter | Mixture | Rows | None] = {}

    def __del__(self):
        self.drop(list(self._adapters))  # the generator was dropped

    def add(self, uids: Iterable[int], adapter: MountedAdapter | Mixture) -> None:
        """Add rows with their adapter or sum of adapters."""
        for uid in uids:
            for each in adapters_in(adapter):
                self._mounts.use(each)
            self._adapters[uid] = adapter

    def drop(self, uids: Iterable[int]) -> None:
        """Drop finished rows, and release their adapters."""
        for uid in uids:
            for each in adapters_in(self._adapters.pop(uid, None)):
                self._mounts.done(each)
        if not self._adapters:
            self._selections.clear()

    def signed(self, uid: int, caches: list[Any]) -> SignedCache:
        """A row's caches with its adapter."""
        return signed(caches, self._adapters.get(uid))

    def selection(self, uids: Sequence[int]) -> MountedAdapter | Mixture | Rows | None:
        """The selection for a batch of these rows, in this order."""
        order = tuple(uids)
        if order not in self._selections:
            if len(self._selections) >= 4:
                self._selections.clear()
            self._selections[order] = select([self._adapters.get(uid) for uid in order])
        return self._selections[order]
