"""How tests start several ranks on this machine."""

import os
import socket
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

#: ``mlx.launch`` without its wait for room in the ranks' input, which there always is: that takes a
#: core from the ranks. What is typed reaches none of them.
QUIET = """
from select import select
from mlx._distributed_utils import launch
launch.select = lambda read, write, *rest: (select(read, [], *rest)[0], [], [])
launch.main()
"""


def launcher(ranks: int, *, whole: bool = False) -> list[str]:
    """The words before a command that ``mlx.launch`` runs on so many ranks over loopback.

    ``whole`` takes the command itself.
    """
    program = ["mlx.launch"] if whole else [sys.executable, "-c", QUIET]
    port = str(free_ports(ranks))
    words = ["-n", str(ranks), "--backend", "ring", "--starting-port", port, "--"]
    return [*program, *words, "python", str(Path(__file__).parent / "shim" / "rank_start.py")]


def surroundings() -> dict[str, str]:
    """An environment in which ``mlx.launch`` and ``python`` are those of this interpreter."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "OPENBLAS_NUM_THREADS": "1"}


def free_ports(count: int) -> int:
    """The first of some consecutive ports of loopback that are free now."""
    while True:
        with ExitStack() as held:
            sockets = [held.enter_context(socket.socket()) for _ in range(count)]
            sockets[0].bind(("127.0.0.1", 0))
            start = sockets[0].getsockname()[1]
            with suppress(OSError, OverflowError):
                for offset, other in enumerate(sockets[1:], 1):
                    other.bind(("127.0.0.1", start + offset))
                return start
