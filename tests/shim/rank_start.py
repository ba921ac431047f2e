"""Starts a command on one rank, in a folder of its own for what MLX builds.

For a CPU, MLX builds a library for each compiled function in a folder that all processes share.
Ranks that start together may load what another has written half.
"""

import os
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    worker, rank = os.environ.get("PYTEST_XDIST_WORKER", "alone"), os.environ.get("MLX_RANK", "0")
    own = Path(tempfile.gettempdir()) / "mlx-ranks" / worker / rank
    own.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = str(own)
    os.execvp(sys.argv[1], sys.argv[1:])
