"""``python -m mlx_optiq_ext`` prints the status, with every patched module loaded."""

import argparse

from ._status import status

if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m mlx_optiq_ext", description="Print the status.")
    parser.add_argument(
        "--verbose", action="store_true", help="list each feature's reason and each patch"
    )
    print(status(load=True, verbose=parser.parse_args().verbose))
