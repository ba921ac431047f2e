"""``python -m mlx_optiq_ext`` prints the status, with every patched module loaded."""

import argparse
import os
from pathlib import Path

from ._status import status

if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m mlx_optiq_ext", description="Print the status.")
    parser.add_argument(
        "--verbose", action="store_true", help="list each feature's reason and each patch"
    )
    print(status(load=True, verbose=parser.parse_args().verbose))
    # A folder of --optiq-prompt-cache, all of whose files are read.
    if folder := os.environ.get("MLX_OPTIQ_EXT_PROMPT_CACHE"):
        from .prompts import summary

        print("\n".join(summary(Path(folder))))
