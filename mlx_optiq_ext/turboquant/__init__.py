"""TurboQuant: vectors as a random rotation, a scalar codebook and a norm.

Nothing is calibrated, so any vectors will do::

    import mlx.core as mx
    from mlx_optiq_ext import turboquant

    quantizer = turboquant.create_quantizer(dim=128, bits=3)
    keys = mx.random.normal((8, 128))
    restored = quantizer.decode(quantizer.encode(keys))
    print(quantizer.bits_per_element, mx.square(restored - keys).mean())
"""

from .codebook import BITS, levels
from .quantizer import Encoded, ProductQuantizer, Quantizer, create_quantizer
from .rotation import Rotation

__all__ = [
    "BITS",
    "Encoded",
    "ProductQuantizer",
    "Quantizer",
    "Rotation",
    "create_quantizer",
    "levels",
]
