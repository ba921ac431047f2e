"""KL divergence under TurboQuant caches beside affine ones, by stored bits.

    python tests/benchmarks/kv/turboquant.py MODEL TEXT [--windows 4] [--length 512]

Every layer's keys and values are packed alike; the divergence of the final logits from those with
unpacked caches is the mean over all positions of windows spread over the text, in nats. ``r``
rotates before affine packing, ``t`` is TurboQuant, ``t, not rotated`` its codebook alone.
"""

import argparse
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_optiq_ext.kv.formats import TurboQuant
from mlx_optiq_ext.turboquant import BITS, Quantizer

AFFINE = [(2, 64), (2, 32), (3, 64), (3, 32), (4, 64), (4, 32)]


class Unrotated(TurboQuant):
    """TurboQuant's codebook on vectors as they come."""

    def pack(self, array: mx.array) -> tuple[mx.array, mx.array]:
        """As TurboQuant, but its rotation."""
        found = _Plain(array.shape[-1], self.bits).encode(array)
        return found.codes, found.norms

    def turn(self, array: mx.array) -> mx.array:
        """Nothing."""
        return array

    def turn_back(self, array: mx.array) -> mx.array:
        """Nothing."""
        return array

    def __str__(self) -> str:
        return f"{super().__str__()}, not rotated"


class _Plain(Quantizer):
    @property
    def rotation(self):
        return lambda unit: unit


def main() -> None:
    """Print one line a format, least stored bits first."""
    import mlx_lm

    from mlx_optiq_ext import kv
    from mlx_optiq_ext.kv.planning.replay import Replay

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    model, tokenizer = mlx_lm.load(args.model)[:2]
    if mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(mx.float32)
    tokens = np.array(tokenizer.encode(args.text.read_text(encoding="utf-8")))
    starts = np.linspace(0, len(tokens) - args.length, args.windows).astype(int)
    runs = [Replay(model, mx.array(tokens[s : s + args.length])[None]) for s in starts]
    dim = next(iter(runs[0].shapes.values()))[0][-1]
    formats = [kind(bits).fitted(dim) for bits in BITS for kind in (TurboQuant, Unrotated)]
    formats += [kv.formats.Affine(b, g, rotated) for b, g in AFFINE for rotated in (False, True)]
    print(f"head dimension {dim}, {args.windows} x {args.length} tokens\n")
    print("| format | stored bits | KL |\n|---|---|---|")
    for format in sorted(formats, key=lambda f: f.bits_per_element):
        plan = dict.fromkeys(runs[0].owners, kv.LayerFormat(format, format))
        divergence = np.mean([run.divergence(plan) for run in runs])
        print(f"| {format} | {format.bits_per_element:.3f} | {divergence:.5f} |", flush=True)


if __name__ == "__main__":
    main()
