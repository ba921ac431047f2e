"""``python -m mlx_optiq_ext`` prints the status, with every patched module loaded."""

from ._status import status

if __name__ == "__main__":
    print(status(load=True))
