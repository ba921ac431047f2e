"""A plugin that uses every hook. Copy what you need."""

import os
from pathlib import Path

from mlx_optiq_ext import OptiqError, hookimpl


@hookimpl
def optiq_add_arguments(command, group):
    if command == "convert":
        group.add_argument(
            "--optiq-example-bits", type=int, metavar="N", help="Bits of every quantized layer."
        )


@hookimpl
def optiq_check_options(command, options, args):
    if command != "convert" or options.example_bits is None:
        return
    if not args.quantize:
        raise OptiqError("--optiq-example-bits needs -q")


@hookimpl
def optiq_quant_predicate(options):
    bits = getattr(options, "example_bits", None)
    if bits is None:
        return None
    return lambda path, module: {"bits": bits, "group_size": 64}


@hookimpl
def optiq_sensitivity_methods():
    return [BySize()]


class BySize:
    """Treats every element alike: the error of n bits is about 4 to the power of -n.

    It measures nothing, so it takes no time and no memory.
    """

    name, version, needs = "by-size", 1, frozenset()

    def measure(self, problem):
        return {
            tensor.path: {p: tensor.size * 4.0**-p.bits for p in tensor.precisions}
            for tensor in problem.tensors
        }


@hookimpl
def optiq_prompt_cache(model, max_kv_size):
    from mlx_lm.models.cache import RotatingKVCache

    # None leaves the caches to mlx-lm.
    if max_kv_size is None:
        return None
    return [RotatingKVCache(max_size=max_kv_size // 2) for _ in model.layers]


@hookimpl
def optiq_kv_formats():
    from optiq_example_int8 import Int8

    return [Int8]


@hookimpl
def optiq_attention_backends():
    return [short_contexts]


def short_contexts(queries, keys, values, scale, mask, sinks):
    """Attend in float32 over up to 64 tokens; longer contexts go to the package's own kernels."""
    import mlx.core as mx

    if keys.shape[2] > 64:
        return None
    sides = (s.stored(mx.float32) if hasattr(s, "stored") else s for s in (keys, values))
    exact = queries.astype(mx.float32)
    output = mx.fast.scaled_dot_product_attention(
        exact, *sides, scale=scale, mask=mask, sinks=sinks
    )
    return output.astype(queries.dtype)


@hookimpl
def optiq_lora_rank(path, rank):
    return 2 * rank if path.endswith("v_proj") else None


@hookimpl
def optiq_resolve_adapter(name):
    scheme, _, folder = name.partition(":")
    return Path(os.environ["OPTIQ_EXAMPLE_ADAPTERS"]) / folder if scheme == "example" else None


@hookimpl
def optiq_status():
    return ["example: every hook is in use"]
