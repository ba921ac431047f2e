"""What was measured on a machine: rates of products by dtype and quantization, and kernel times."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import files
from ..errors import InputError

#: Of what is measured and how it is stored. A file of another version is refused.
VERSION = 2
#: Of the activations that layers compute in.
DTYPES = ("float32", "bfloat16", "float16")
AGAIN = "measure again with --optiq-calibrate-chip"


@dataclass(frozen=True)
class Products:
    """Rates of products with one kind of weight.

    Attributes:
        dtype: Of the activations.
        bits: Stored bits of a weight, with scales and biases.
        quantized: Whether the product unpacks its weights.
        gbs: 1e9 bytes of weights a second in products with one row, as decoding does.
        tflops: 1e12 FLOP a second in products with many rows, as reading a prompt does.
        setup_ps: Picoseconds that such a product takes for each weight whatever its rows: to read
            it from memory, to unpack it, to arrange it.
    """

    dtype: str
    bits: float
    quantized: bool
    gbs: float
    tflops: float
    setup_ps: float = 0.0


@dataclass(frozen=True)
class Layers:
    """Rates of what a decoder layer does beside its products.

    Attributes:
        dtype: Of the activations.
        cache_gbs: 1e9 bytes of keys and values a second that one token's attention reads.
        attention_tflops: 1e12 FLOP a second of a prompt's attention, counted without the masked.
        element_ns: Nanoseconds that norms, rotary embeddings, activation and sums take for each
            output of the layer's products.
    """

    dtype: str
    cache_gbs: float
    attention_tflops: float
    element_ns: float


@dataclass(frozen=True)
class Measured:
    """A machine's own numbers.

    Attributes:
        launch_us: Microseconds of a kernel where launching is all there is to do: a decode step of
            a small model by the kernels that are counted in it.
        gap_us: Microseconds that a kernel adds to larger ones that hide its launch.
        products: Rates of products.
        layers: Rates of what is beside them.
        failed: What could not be measured, and why.
    """

    launch_us: float
    gap_us: float
    products: tuple[Products, ...]
    layers: tuple[Layers, ...]
    failed: tuple[str, ...] = ()

    def rates(self, dtype: str, bits: float, *, quantized: bool) -> Products:
        """Rates of products with weights of a width.

        Widths between measured ones are interpolated.

        Raises:
            InputError: No such product was measured.
        """
        alike = sorted(
            (p.bits, p.gbs, p.tflops, p.setup_ps)
            for p in self.products
            if p.dtype == dtype and p.quantized == quantized
        )
        if not alike:
            raise self._missing(f"{dtype} products with {_KIND[quantized]} weights")
        widths, *columns = np.array(alike).T
        gbs, tflops, setup = (float(np.interp(bits, widths, column)) for column in columns)
        return Products(dtype, bits, quantized, gbs, tflops, setup)

    def beside(self, dtype: str) -> Layers:
        """Rates of what is beside a layer's products.

        Raises:
            InputError: They were not measured.
        """
        for found in self.layers:
            if found.dtype == dtype:
                return found
        raise self._missing(f"attention and norms in {dtype}")

    def _missing(self, what: str) -> InputError:
        why = f" ({'; '.join(self.failed)})" if self.failed else ""
        return InputError(f"this machine's {what} were not measured{why}: {AGAIN}, or name a chip")


_KIND = {True: "quantized", False: "unquantized"}


def read_measured(value: Any, where: str) -> Measured:
    """What a chip's file says was measured.

    Raises:
        InputError: A field is missing or wrong, or the file is of another version.
    """
    fields = files.Fields.of(value, where)
    if fields.entry.get("version") != VERSION:
        raise InputError(f"{where} is of another version than {VERSION}: {AGAIN}")
    products = []
    for entry in _entries(fields, "products"):
        products.append(
            Products(
                entry.choice("dtype", DTYPES),
                positive(entry, "bits"),
                entry.flag("quantized"),
                positive(entry, "gbs"),
                positive(entry, "tflops"),
                entry.number("setup_ps", 0, default=0.0),
            )
        )
    layers = [
        Layers(
            entry.choice("dtype", DTYPES),
            positive(entry, "cache_gbs"),
            positive(entry, "attention_tflops"),
            entry.number("element_ns", 0),
        )
        for entry in _entries(fields, "layers")
    ]
    failed = fields.items("failed", default=[])
    if not all(isinstance(line, str) for line in failed):
        raise fields.refusal("failed", "a list of strings")
    return Measured(
        positive(fields, "launch_us"),
        fields.number("gap_us", 0),
        tuple(products),
        tuple(layers),
        tuple(failed),
    )


def positive(fields: files.Fields, name: str) -> float:
    """A finite number above 0.

    Raises:
        InputError: The field is none.
    """
    value = fields.number(name, 0)
    if value == 0:
        raise fields.refusal(name, "a number above 0")
    return value


def _entries(fields: files.Fields, name: str) -> list[files.Fields]:
    listed = enumerate(fields.items(name))
    return [files.Fields.of(value, f"{fields.where}: {name}[{n}]") for n, value in listed]
