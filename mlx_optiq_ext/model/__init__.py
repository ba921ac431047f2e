"""What any model is and how it is run. Nothing in here knows of quantization.

Which decoder layer each module of a model is in::

    import mlx_lm
    from mlx_optiq_ext import model

    loaded, tokenizer = mlx_lm.load("Qwen/Qwen3-0.6B")
    print(len(model.decoder_layers(loaded)), model.layer_index(loaded)["model.layers.0.mlp"])
"""

from .headers import Header, read_headers
from .layers import decoder_layers, layer_index, quantizable
from .loading import load_unquantized, model_digest
from .taps import Use, tapped

__all__ = [
    "Header",
    "Use",
    "decoder_layers",
    "layer_index",
    "load_unquantized",
    "model_digest",
    "quantizable",
    "read_headers",
    "tapped",
]
