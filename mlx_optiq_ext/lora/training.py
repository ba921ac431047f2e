"""Prepares a model for training: ranks, initialization, and how the adapter is saved."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_unflatten

from .. import distributed
from ..errors import InputError
from ..planning.calibration import on
from . import rank_scaling
from .averaging import hand_out_start
from .choice import Choose
from .forms.checkpoint import Checkpoint
from .forms.location import HIGHEST_SCALE
from .forms.peft_writing import Naming, base_config
from .forms.reading import read_tensors
from .geometry import EMBEDDING, EXPERTS, Geometry, geometry
from .layers import adapted_layers, base_of, with_rank
from .residual import start_from_residual

#: The scaling that trained best (tests/benchmarks/lora_ranks.py).
DEFAULT_SCALING = rank_scaling.BY_KL


@dataclass(frozen=True)
class Request:
    """Settings of a training.

    Attributes:
        model: The base model's folder or name.
        folder: The folder for the adapter.
        scaling: One of ``rank_scaling.SCALINGS``.
        original: Loads the unquantized model for the residual; None keeps mlx-lm's initialization.
        samples: Tokens of training texts, to weight that residual by.
        resume: An ``adapters.safetensors`` to go on from.
        compiled: Whether the training step is compiled.
    """

    model: str
    folder: Path
    scaling: str = DEFAULT_SCALING
    original: Callable[[], nn.Module] | None = None
    samples: Callable[[], Sequence[Sequence[int]]] = tuple
    resume: Path | None = None
    compiled: bool = True


def check_parameters(parameters: Any) -> None:
    """Refuse LoRA parameters that ranks cannot be spread with.

    Args:
        parameters: mlx-lm's ``lora_parameters``, as read from a file.

    Raises:
        InputError: The rank or the scale is wrong.
    """
    known = parameters if isinstance(parameters, Mapping) else {}
    rank, scale = known.get("rank"), known.get("scale")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"lora_parameters: rank is {rank!r}: give a whole number from 1 on")
    number = scale if isinstance(scale, int | float) and not isinstance(scale, bool) else -1
    if not 0 < number <= HIGHEST_SCALE:
        raise InputError(
            f"lora_parameters: scale is {scale!r}: give a number above 0, up to {HIGHEST_SCALE:g}"
        )
    dropout = known.get("dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError(
            f"lora_parameters: dropout is {dropout!r}: give a number from 0 to below 1"
        )


def prepare(
    model: nn.Module,
    parameters: Mapping[str, Any],
    request: Request,
    choose: Choose | None = None,
) -> Checkpoint:
    """Give a model's LoRA layers their ranks and starting weights, the same in every process.

    Args:
        model: With mlx-lm's LoRA layers, all of one rank. It is changed.
        parameters: mlx-lm's ``lora_parameters``.
        request: See `Request`.
        choose: May replace a layer's rank.

    Returns:
        How to save the adapter.

    Raises:
        InputError: The rank does not suit a layer, the folder holds another adapter, or the file
            to go on from is of other ranks.
    """
    layers = adapted_layers(model)
    shapes: dict[str, Geometry] = {}
    for path, layer in layers.items():
        shape = geometry(base_of(layer))
        assert shape is not None
        shapes[path] = shape
    if not shapes:
        raise InputError("no layer is adapted: check lora_parameters.keys and --num-layers")
    rank, dropout = int(parameters["rank"]), float(parameters.get("dropout", 0.0))
    measured = {}
    if request.scaling == rank_scaling.BY_KL:
        measured = rank_scaling.measured_kl(request.model, shapes)
    weight = rank_scaling.weights(request.scaling, shapes, measured)
    ranks = rank_scaling.allocate(shapes, rank, weight)
    if choose is not None:
        ranks = {
            path: choose(path, base_of(layers[path]), each) or each for path, each in ranks.items()
        }
    dora = any("m" in layer for layer in layers.values())
    scaling = request.scaling if weight is not None else rank_scaling.CONSTANT
    checkpoint = _checkpoint(model, request, parameters, shapes, ranks, scaling, dora=dora)
    checkpoint.check_folder()
    changed = {
        path: with_rank(layer, ranks[path], dropout)
        for path, layer in layers.items()
        if ranks[path] != rank or layer.lora_a.shape != shapes[path].shapes(rank)[0]
    }
    model.update_modules(tree_unflatten(list(changed.items())))
    layers = adapted_layers(model)
    distributed.compare(ranks=str(ranks))
    # Only the first rank's host needs the original model and the file to resume from.
    if distributed.leads():
        if request.original is not None:
            start_from_residual(model, layers, request.original(), request.samples())
        if request.resume is not None:
            resume(layers, request.resume)
    hand_out_start(model)
    return checkpoint


def summary(checkpoint: Checkpoint) -> str:
    """A line for the terminal."""
    notes = checkpoint.notes
    ranks = sorted(checkpoint.ranks.values())
    spread = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    line = (
        f"[optiq] {notes['scaling']}: {spread}, {notes['parameters']:,} parameters "
        f"(constant rank {checkpoint.rank}: {notes['budget']:,})"
    )
    if notes["scaling"] != notes["asked"]:
        why = "the layers' bits are all the same"
        if notes["asked"] == rank_scaling.BY_KL:
            why = "this model has no measured KL (optiq_metadata.json)"
        line += f"; {notes['asked']} has nothing to go by: {why}"
    if source := notes.get("measured_on"):
        line += f"; KL measured on text {on(source)}"
    if left_out := notes["not_in_peft"]:
        line += (
            f"\n[optiq] not in the PEFT form, which has no layer for them: {', '.join(left_out)}"
        )
    return line


def resume(layers: Mapping[str, Any], path: Path) -> None:
    """Load a checkpoint into LoRA layers of the same true ranks.

    Raises:
        InputError: The checkpoint is damaged, or from another training.
    """
    tensors = read_tensors(path)
    for name, layer in layers.items():
        stored = {part: tensors.pop(f"{name}.{part}", None) for part in ("lora_a", "lora_b")}
        if any(value is None for value in stored.values()):
            raise InputError(f"{path} has no {name}: it is of a training with other layers")
        a, b = stored["lora_a"], stored["lora_b"]
        axis = 1 if layer.lora_a.ndim == 3 else -1
        rank = layer.lora_a.shape[axis]
        assert a is not None
        assert b is not None
        rest = b[..., rank:] if layer.lora_a.ndim == 3 else b[rank:]
        a = a[:, :rank]
        b = b[..., :rank] if layer.lora_a.ndim == 3 else b[:rank]
        fits = (a.shape, b.shape) == (layer.lora_a.shape, layer.lora_b.shape)
        if not fits or (rest.size and rest.any().item()):
            raise InputError(
                f"{path} has another rank than {rank} at {name}: go on with the "
                "--optiq-rank-scaling and rank that it was trained with"
            )
        layer.lora_a, layer.lora_b = a, b
        if "m" in layer:
            layer.m = tensors.pop(f"{name}.m", layer.m)
    if tensors:
        raise InputError(
            f"{path} adapts {min(tensors)}, which this training does not: go on with the "
            "--num-layers and keys that it was trained with"
        )


def _checkpoint(
    model: nn.Module,
    request: Request,
    parameters: Mapping[str, Any],
    shapes: Mapping[str, Geometry],
    ranks: Mapping[str, int],
    scaling: str,
    *,
    dora: bool,
) -> Checkpoint:
    rank = int(parameters["rank"])
    config = base_config(request.model)
    found = Naming.of(config, shapes)
    naming = Naming(
        wrapped=found.wrapped,
        embeddings=tuple(path for path, shape in shapes.items() if shape.kind == EMBEDDING),
        tied=not any(path.rpartition(".")[2] == "lm_head" for path, _ in model.named_modules()),
    )
    left_out = [
        path
        for path, shape in shapes.items()
        if shape.kind == EXPERTS or (dora and shape.kind == EMBEDDING)
    ]
    notes = {
        "asked": request.scaling,
        "scaling": scaling,
        "init": "residual" if request.original is not None else "mlx-lm",
        "rank": rank,
        "scale": float(parameters["scale"]),
        "dora": dora,
        "parameters": sum(shapes[path].per_rank * each for path, each in ranks.items()),
        "budget": sum(shape.per_rank * rank for shape in shapes.values()),
        "ranks": dict(ranks),
        "bits": {path: shape.bits for path, shape in shapes.items()},
        "not_in_peft": left_out,
        "base_model": request.model,
    }
    if scaling == rank_scaling.BY_KL:
        notes["measured_on"] = rank_scaling.measured_on(request.model)
    return Checkpoint(
        folder=request.folder,
        ranks=ranks,
        scale=float(parameters["scale"]),
        rank=rank,
        naming=naming,
        notes=notes,
        base_model=request.model,
        dropout=float(parameters.get("dropout", 0.0)),
        dora=dora,
    )
