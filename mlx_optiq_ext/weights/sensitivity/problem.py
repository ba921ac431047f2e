"""A model to measure, with its tensors and calibration sequences; judges whole plans."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ... import distributed, files
from ...model.layers import arrays, calls_replaced, decoder_layers, layer_index, quantizable
from ...model.spill import Spill
from ...model.stream import Stream
from ...planning.calibration import Calibration
from ...planning.divergence import Reference
from ...planning.journal import Journal
from ...planning.parts import Parts
from ..candidates import Size, Tensor
from ..precision import AFFINE, Precision, dequantized, pieces
from .moments import Factors

#: Tensor path -> precision -> expected KL in nats per token when only that tensor is quantized.
Sensitivity = dict[str, dict[Precision, float]]

#: Calibration sequences run at once; and on a GPU, where no logits are wanted.
BATCH, GPU_BATCH = 4, 32
#: Tokens that single layers run on at once on a GPU, unless one sequence has more.
GPU_TOKENS = 8192
#: Bytes of one float32 array (tokens, vocabulary) of logits.
LOGITS = 32 << 20
#: Bytes of the hidden states between all layers that are held in memory.
HELD = 1 << 30


@dataclass
class Findings:
    """Results of one step of a conversion for later steps.

    Attributes:
        factors: Tensor path -> its factors, after a backward pass.
        notes: Requests that could not be met, one line each, for the metadata.
        judged: Whole plans that were judged, by what they give each tensor.
        parts: How to run the model with a chunk of logits at a time.
    """

    factors: Mapping[str, Factors] | None = None
    notes: list[str] = field(default_factory=list)
    judged: dict[str, Any] = field(default_factory=dict)
    parts: Parts | None = None


@dataclass(frozen=True)
class Problem:
    """A model whose tensors are to be measured.

    Attributes:
        model: The model, with every parameter in the dtype to compute in.
        weights: Tensor path -> weight ``(..., out, in)`` in the dtype it is stored in.
        tensors: The tensors to measure, with their candidates.
        size: The model's counts before it was cast.
        calibration: The calibration sequences.
        key: Identifies the model and the device for measurements on disk; None keeps none.
        progress: Whether to show a progress bar.
        refine: Whether the quantized weights will be refined, which leaves less error.
        say: Receives one-line messages.
        findings: Results of one step for later steps.
        stream: The model's stream, if its layers are on disk; it is then ``weights`` too.
        scratch: A folder for what does not fit into memory; None for that of measurements.
    """

    model: nn.Module
    weights: Mapping[str, mx.array]
    tensors: tuple[Tensor, ...]
    size: Size
    calibration: Calibration
    key: dict[str, Any] | None = None
    progress: bool = True
    refine: bool = False
    say: Callable[[str], None] = print
    findings: Findings = field(default_factory=Findings)
    stream: Stream | None = None
    scratch: Path | None = None

    def journal(self, name: str, version: int) -> Journal:
        """Measurements of this problem that are kept between runs.

        Args:
            name: Name of the measurements, such as the method's name.
            version: Version of the method; measurements of other versions are ignored.
        """
        if self.key is None:
            return Journal(None)
        tokens = self.calibration.digest
        return Journal({**self.key, "method": name, "tokens": tokens, "version": version})

    def note(self, line: str) -> None:
        """Print a request that could not be met, and keep it for the metadata."""
        self.say(f"[optiq] {line}")
        self.findings.notes.append(line)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype that products are computed in."""
        modules = dict(quantizable(self.model))
        return modules[self.tensors[0].path].weight.dtype

    @property
    def parts(self) -> Parts:
        """How to run the model with a chunk of a sequence's logits at a time."""
        if self.findings.parts is None:
            length = self.calibration.tokens.shape[1]
            self.findings.parts = Parts.of(self.model, 1, length, LOGITS)
        return self.findings.parts

    def spill(self, tokens: int) -> Spill | None:
        """Disk space for the hidden states of so many tokens between all layers, if they are many.

        None if they fit into memory, or not on the disk.
        """
        if self.stream is not None:
            return self.stream.spill
        size = tokens * self.parts.dim * self.dtype.size * len(decoder_layers(self.model))
        folder = self.scratch or files.cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(folder).free
        return Spill(folder) if HELD < size < room / 2 else None

    def layer(self, index: int) -> AbstractContextManager[None]:
        """Keep a decoder layer in memory inside the block, if the model is on disk."""
        return nullcontext() if self.stream is None else self.stream.layer(index)

    def quantized(self, choice: dict[str, Precision]) -> AbstractContextManager[None]:
        """The model with some tensors quantized and dequantized."""
        dtype = self.dtype
        return self.replaced(choice, lambda p: dequantized(self.weights[p], choice[p], dtype))

    @contextmanager
    def replaced(self, paths: Iterable[str], weight: Callable[[str], mx.array]) -> Iterator[None]:
        """The model with other weights.

        Weights of several decoder layers are put in when each layer runs, and removed after it, so
        that there is never a second model in memory.

        Args:
            paths: Paths of the tensors to replace.
            weight: Makes a tensor's weight (..., out, in), in the dtype to compute in.
        """
        modules, index = dict(quantizable(self.model)), layer_index(self.model)
        inner: dict[int, list[str]] = {}
        outer = []
        for path in paths:
            (outer if path not in index else inner.setdefault(index[path], [])).append(path)
        if self.stream is None and len(inner) < 2:
            outer, inner = [*outer, *(path for own in inner.values() for path in own)], {}

        @contextmanager
        def swapped(paths: list[str]) -> Iterator[None]:
            originals = {path: modules[path].weight for path in paths}
            try:
                for path in paths:
                    modules[path].weight = made = weight(path)
                    mx.eval(made)  # one at a time, for what is needed on the way
                    del made
                yield
            finally:
                for path, original in originals.items():
                    modules[path].weight = original

        def call(number: int, original: Any, args: tuple, kwargs: dict) -> Any:
            if number not in inner:
                return original(*args, **kwargs)
            with self.layer(number), swapped(inner[number]):
                output = original(*args, **kwargs)
                mx.eval(arrays(output))
            return output

        with swapped(outer), calls_replaced(decoder_layers(self.model) if inner else [], call):
            yield


def journal_key(path: str, precision: Precision) -> list[Any]:
    """The key of one tensor at one precision in a journal."""
    mode = [] if precision.mode == AFFINE else [precision.mode]
    return [path, precision.bits, precision.group_size, *mode]


def batches(tokens: np.ndarray, size: int = BATCH) -> list[mx.array]:
    """Calibration sequences (n, length) as batches of at most so many."""
    return [mx.array(tokens[i : i + size]) for i in range(0, len(tokens), size)]


def layer_batches(tokens: np.ndarray) -> list[mx.array]:
    """Calibration sequences (n, length) as batches to run single layers on."""
    cpu = mx.default_device() == mx.Device(mx.cpu)
    most = max(1, min(GPU_BATCH, GPU_TOKENS // tokens.shape[1]))
    return batches(tokens, BATCH if cpu else most)


def end_to_end(problem: Problem, choices: list[dict[str, Precision]]) -> list[float]:
    """KL(reference || plan) of whole plans on the held-out sequences, in nats per token."""
    return [float(each.mean(dtype=np.float64)) for each in divergences(problem, choices)]


def divergences(problem: Problem, choices: list[dict[str, Precision]]) -> list[np.ndarray]:
    """KL(reference || plan) of whole plans at each held-out token, in nats.

    The processes of ``mlx.launch`` judge some plans each, and all get every result.

    Returns:
        For each plan float32 (held-out sequences, length).
    """
    own = distributed.share(range(len(choices)))
    rows: dict[int, list[np.ndarray]] = {index: [] for index in own}
    for batch in batches(problem.calibration.held_out) if own else ():
        reference = Reference.run(problem.parts, batch)
        for index in own:
            with problem.quantized(choices[index]):
                rows[index].append(np.array(reference.compared(problem.parts, batch)))
    parts = distributed.gathered({index: np.concatenate(each) for index, each in rows.items()})
    found = {index: each for part in parts for index, each in part.items()}
    return [found[index] for index in range(len(choices))]


def error(weight: mx.array, precision: Precision) -> float:
    """Summed squared error of a weight ``(..., out, in)`` at a precision."""
    if not precision.quantized:
        return 0.0
    total = 0.0
    for _, part in pieces(weight):
        difference = part.astype(mx.float32) - dequantized(part, precision, mx.float32)
        total += float(mx.square(difference).sum())
    return total
