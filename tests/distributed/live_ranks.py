"""Stock servers on several ranks, as tests start them."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from live_server import Server, await_answer, free_port
from loopback import launcher, surroundings

#: Runs the server on every rank, and notes the process of each.
SERVE = """
import os, sys
from pathlib import Path
Path(f"pid-{os.environ['MLX_RANK']}").write_text(str(os.getpid()))
from mlx_lm.server import main
main()
"""


@contextlib.contextmanager
def serve_ranks(
    count: int, folder: Path, *arguments: object, code: str = SERVE, whole: bool = False
):
    """Run ``mlx_lm.server`` on ranks that ``mlx.launch`` starts, until the block ends.

    Each rank's process is in ``folder / "pid-RANK"``, all that they print in ``folder / "log"``.
    """
    port = free_port()
    server = ["python", "-c", code, "--port", str(port), "--log-level", "INFO"]
    silence, held = os.pipe()  # at the end of its input the launcher would spin
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*launcher(count, whole=whole), *server, *map(str, arguments)],
            cwd=folder,
            env=surroundings(),
            stdin=silence,
            stdout=stream,
            stderr=stream,
            text=True,
            start_new_session=True,
        )
    found = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        await_answer(found)
        yield found
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        os.close(silence)
        os.close(held)
