"""Loading, describing and running models. Nothing in here depends on quantization.

Which decoder layer each module of a model is in::

    import mlx_lm
    from mlx_optiq_ext import model

    loaded, tokenizer = mlx_lm.load("Qwen/Qwen3-0.6B")
    print(len(model.decoder_layers(loaded)), model.layer_index(loaded)["model.layers.0.mlp"])

Files, each of which imports only from those above it:

- ``hub.py``: where the files are, in a folder or on the Hub
- ``config.py``: what config.json says, and what a model's parts are called
- ``headers.py``: names, shapes and sizes of stored tensors
- ``loading.py``: loading, casting and telling models apart
- ``source.py``: a model's files, and checking that they do not change meanwhile
- ``layers.py``: decoder layers and linear layers, and replacing their calls
- ``finite.py``: refusing NaN, infinity and models that compute them
- ``vocabulary.py``: refusing tokens that a model has no embedding for
- ``taps.py``: inputs and outputs of linear layers while a model runs
- ``replay.py``: recording the decoder layers' calls, and running a model from one of them on
- ``spill.py``: arrays and recordings kept on disk
- ``memory.py``: whether a model fits into memory
- ``stream.py``: decoder layers read from disk while they run
- ``layerwise.py``: recording many batches, one decoder layer at a time
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
