"""Time and peak memory of conversions with a budget, beside stock's uniform conversion.

    python tests/benchmarks/weights/conversion.py [MODEL] [--budget 3.5] [--calibration FILE]

Each conversion runs in a process of its own with an empty measurement cache.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TINY = Path(__file__).parents[2] / "data" / "tiny-qwen3"


def run(*arguments: str, environment: dict[str, str]) -> tuple[float, float]:
    """Seconds and peak resident GiB of one ``mlx_lm convert``."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "mlx_lm", "convert", *arguments]
    subprocess.run(command, check=True, env={**os.environ, **environment})
    seconds = time.perf_counter() - started
    # Kilobytes on Linux, bytes on macOS; the largest child so far.
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit


def main() -> None:
    """Print one line a conversion, the smaller one first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(TINY))
    parser.add_argument("--budget", default="3.5")
    parser.add_argument("--calibration")
    args = parser.parse_args()
    extra = ["--optiq-calibration", args.calibration] if args.calibration else []
    with tempfile.TemporaryDirectory() as folder:
        environment = {"MLX_OPTIQ_EXT_CACHE": f"{folder}/cache"}
        stock = run(
            *("--hf-path", args.model, "--mlx-path", f"{folder}/stock", "-q"),
            environment=environment,
        )
        ours = run(
            *("--hf-path", args.model, "--mlx-path", f"{folder}/ours"),
            *("--optiq-effort", "plan", "--optiq-budget", args.budget, *extra),
            environment=environment,
        )
    print(f"stock uniform: {stock[0]:.1f} s, peak {stock[1]:.2f} GiB")
    print(f"budget {args.budget}: {ours[0]:.1f} s, peak {ours[1]:.2f} GiB")


if __name__ == "__main__":
    main()
