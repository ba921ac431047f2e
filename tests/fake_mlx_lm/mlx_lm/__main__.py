import importlib
import sys

if __name__ == "__main__":
    importlib.import_module(f"mlx_lm.{sys.argv.pop(1)}").main()
