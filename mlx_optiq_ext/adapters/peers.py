"""What a request brought from another process, as it is mounted in this one."""

import mlx.nn as nn

from .. import distributed
from .mixture import Mixture, MountedAdapter, mixed
from .mounting import Mounts, mounts_on


def counterpart(
    model: nn.Module, selection: MountedAdapter | Mixture | None
) -> MountedAdapter | Mixture | None:
    """The adapters on this process's model that are those of another process.

    Raises:
        RankError: One is not mounted here.
    """
    mounts = mounts_on(model)
    if selection is None or mounts is None:
        return None
    if isinstance(selection, MountedAdapter):
        return _own(mounts, selection)
    return mixed([(_own(mounts, each), scale) for each, scale in selection.members])


def _own(mounts: Mounts, adapter: str | MountedAdapter) -> MountedAdapter:
    name = adapter if isinstance(adapter, str) else adapter.name
    own = mounts.resolve(adapter) or mounts.names.get(name)
    if not isinstance(own, MountedAdapter) or (
        isinstance(adapter, MountedAdapter) and own.version != adapter.version
    ):
        raise distributed.RankError(f"rank {distributed.rank()} has no such adapter {name!r}")
    return own
