"""Write the calibration sequences that this package uses as int32 arrays, for rivals to use too.

    python windows.py MODEL CALIBRATION OUT.npz [--windows N]

``planning`` (n, length) are those that plans are measured and judged on, ``refining`` all those
that refinement may use besides; ``text`` (count,) is the whole text.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from mlx_lm.utils import load_tokenizer

from mlx_optiq_ext.planning.calibration import from_texts
from mlx_optiq_ext.planning.texts import read_texts, tokenized


def main() -> None:
    """Tokenize and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=int, help="use only the first windows")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    found = from_texts(read_texts(args.calibration), tokenizer, args.calibration.name)
    found = replace(found, tokens=found.tokens[: args.windows])
    every = found.tokens if found.more is None else np.concatenate([found.tokens, found.more])
    text = tokenized(read_texts(args.calibration), tokenizer)
    named = {"planning": found.tokens, "measured": found.measured, "refining": every}
    np.savez(args.out, text=text, **named)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
