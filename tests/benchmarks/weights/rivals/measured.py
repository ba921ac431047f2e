"""Run a module or a script as the main program, then write down MLX's peak memory.

    python measured.py REPORT.json (-m MODULE | SCRIPT) [ARGUMENT...]

Needs mlx only, so that it also runs in a rival's environment.
"""

import json
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Hand over to the program; its exit status is kept."""
    report, *command = sys.argv[1:]
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path[0] = str(Path(command[0]).parent)
            runpy.run_path(command[0], run_name="__main__")
    finally:
        import mlx.core as mx

        Path(report).write_text(json.dumps({"mlx_peak_bytes": mx.get_peak_memory()}))


if __name__ == "__main__":
    main()
