"""TurboQuant: vectors as a random rotation, a scalar codebook and a norm."""

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
