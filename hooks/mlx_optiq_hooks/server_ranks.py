"""``mlx_lm.server`` on several ranks: what ends one of them ends all, with the reason.

Stock's other ranks wait for a generation thread that died; its HTTP server stays up.
"""

from . import session
from .patch import Patch, bind


def _ranks():
    """The ranks of the running server, if it was given our options and runs on several."""
    running = session.current()
    if running is None or running.command != "server":
        return None
    from mlx_optiq_ext import ranks

    return ranks if ranks.size() > 1 else None


def _generate(wrapped, instance, args, kwargs):
    ranks = _ranks()
    if ranks is None:
        return wrapped(*args, **kwargs)
    try:
        return wrapped(*args, **kwargs)
    except Exception as error:
        kind = "" if isinstance(error, ranks.RankError) else f"{type(error).__name__}: "
        ranks.leave(f"rank {ranks.rank()} stops serving: {kind}{error}")


def _next_request(wrapped, instance, args, kwargs):
    ranks = _ranks()
    # Without a timeout a batch runs: another rank may be busy for as long as a step takes.
    if ranks is None or bind(wrapped, args, kwargs).get("timeout") is None:
        return wrapped(*args, **kwargs)
    late = f"rank {ranks.rank()} heard nothing of the others for {ranks.LIMIT:.0f} s"
    with ranks.within(ranks.LIMIT, lambda: late):
        return wrapped(*args, **kwargs)


_UPSTREAM = "none: the other ranks wait for ever (server.py)"

PATCHES = (
    Patch(
        "mlx_lm.server:ResponseGenerator._generate",
        feature="sharded",
        why="ends all ranks when one cannot go on",
        upstream=_UPSTREAM,
        wrapper=_generate,
    ),
    Patch(
        "mlx_lm.server:ResponseGenerator._next_request",
        feature="sharded",
        why="ends an idle rank when the others are gone",
        upstream=_UPSTREAM,
        wrapper=_next_request,
    ),
)
