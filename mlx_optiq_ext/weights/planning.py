"""From a model and a budget to a plan."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from .. import files, ranks
from ..errors import BudgetError, InputError
from . import calibration as calibrations
from . import memory
from .calibration import Calibration
from .journal import model_digest
from .kl import kl
from .packing import BITS, GROUP_SIZES, Size, Tensor, quantizable, tensors
from .plan import Plan
from .search import Study, search
from .sensitivity import Method, Problem
from .stream import Stream, runs_whole
from .taylor import taylor

METHODS: Mapping[str, Method] = {"taylor": taylor, "kl": kl}


def study_model(
    model: nn.Module,
    tokenizer: Any,
    *,
    budget: float | None = None,
    bits: tuple[int, ...] | None = None,
    group_sizes: tuple[int, ...] | None = None,
    calibration: Path | None = None,
    method: Method = taylor,
    method_name: str = "taylor",
    refine: bool = False,
    digest: str | None = None,
    load: Callable[[], nn.Module] | None = None,
    scratch: Path | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Study:
    """Measure what every candidate packing of every quantizable tensor costs.

    The ranks of ``mlx.launch`` share the work, and all get the same result.

    Args:
        model: An unquantized mlx-lm model in the dtype it will be saved in. On a CPU its parameters
            are replaced by float32 copies, since half precision is slow there.
        tokenizer: Its tokenizer.
        budget: Bits per weight to check before anything is measured.
        bits: Widths to consider; None for all, with "leave unpacked" among the candidates.
        group_sizes: Group sizes to consider; None for all.
        calibration: A text or JSON-lines file, or None for mlx-lm's own text.
        method: Measures the sensitivities.
        method_name: Its name, for the metadata.
        refine: Whether the packed weights will be refined.
        digest: Hash of the model, under which measurements are kept; None keeps none for later.
        load: Loads the model again, not evaluated. With it, a model too large for memory is read
            layer by layer, which takes its parameters out of ``model``; see `memory.streams`.
        scratch: Folder for temporary files of such a model; None for the cache.
        progress: Whether to show progress bars.
        say: Receives one-line messages.

    Raises:
        BudgetError: The budget is outside of what this model allows; the message names the range.
        InputError: The model or an argument is not usable.
    """
    candidates = tuple(
        tensors(model, bits or BITS, group_sizes or GROUP_SIZES, allow_unpacked=bits is None)
    )
    if not candidates:
        raise InputError(
            f"no tensor of this model can be packed in groups of {_names(group_sizes)}: give other "
            "--optiq-group-sizes"
        )
    size = Size.of(model, candidates)
    if budget is not None:
        check_budget(budget, size, candidates)
    stream = _stream(model, load, scratch, say)
    modules = dict(quantizable(model))
    weights = stream or {t.path: modules[t.path].weight for t in candidates}
    model.update(tree_map(to_compute_dtype, model.parameters()))
    data = load_calibration(model, tokenizer, calibration, say)
    ranks.compare(**{"model": digest, "calibration data": data.whole_digest})
    key = {"model": digest, "device": str(mx.default_device())} if digest else None
    problem = Problem(model, weights, candidates, data, key, progress, refine, say, stream=stream)
    say(
        f"[optiq] Measuring {len(candidates)} tensors with {method_name} on "
        f"{data.measured.size} tokens ({data.source})"
    )
    # A method may not know of other ranks, whose hardware may round in another way.
    return Study(problem, size, ranks.broadcast(method(problem)), method_name)


def plan_model(model: nn.Module, tokenizer: Any, budget: float, **settings: Any) -> Plan:
    """Give every quantizable tensor of a loaded model its own packing within a budget.

    Args:
        model: As for `study_model`.
        tokenizer: Its tokenizer.
        budget: Bits per weight as mlx-lm prints them: all stored bits over all parameters.
        settings: For `study_model`.

    Returns:
        A plan whose stored bits fit the budget.

    Raises:
        BudgetError: The budget is outside of what this model allows; the message names the range.
        InputError: The model or an argument is not usable.
    """
    return search(study_model(model, tokenizer, budget=budget, **settings), budget)


def _names(values: tuple[int, ...] | None) -> str:
    return ", ".join(str(v) for v in values or GROUP_SIZES)


def check_budget(budget: float, size: Size, candidates: tuple[Tensor, ...]) -> None:
    """Raise BudgetError with the feasible range if no plan fits a budget."""
    least = size.bits_per_weight(sum(t.stored_bits(t.packings[0]) for t in candidates))
    most = size.bits_per_weight(sum(t.stored_bits(t.packings[-1]) for t in candidates))
    if size.room(budget) < sum(t.stored_bits(t.packings[0]) for t in candidates):
        raise BudgetError(
            f"a budget of {budget:g} bits per weight is too small for this model: with these "
            f"candidates it takes from {least:.3f} to {most:.3f}, counting scales, biases and what "
            "stays unpacked"
        )


def load_calibration(
    model: nn.Module, tokenizer: Any, path: Path | None, say: Callable[[str], None] = print
) -> Calibration:
    """Calibration windows from a file, else mlx-lm's own text, else drawn from the model.

    Each rank reads its own file; the others are rank 0's.
    """
    if path is not None:
        return calibrations.from_texts(calibrations.read_texts(path), tokenizer, path.name)
    text = ranks.first(calibrations.stock_text)
    if text is not None:
        return calibrations.from_texts([text], tokenizer, "mlx-lm")
    say(
        "[optiq] mlx-lm's calibration text is neither cached nor reachable: calibrating on text "
        "sampled from the model itself (--optiq-calibration FILE gives better plans)"
    )
    return ranks.first(lambda: calibrations.sampled(model, tokenizer))


def to_compute_dtype(array: mx.array) -> mx.array:
    """On a CPU, float32 in place of other floating-point types: half precision is emulated."""
    if mx.default_device() == mx.Device(mx.cpu) and mx.issubdtype(array.dtype, mx.floating):
        return array.astype(mx.float32)
    return array


def _stream(
    model: nn.Module,
    load: Callable[[], nn.Module] | None,
    scratch: Path | None,
    say: Callable[[str], None],
) -> Stream | None:
    """The stream of a model too large for memory, if it can be read that way; says so."""
    if load is None or not memory.streams(model):
        return None
    needed, limit = memory.resident_bytes(model) / 2**30, memory.limit() / 2**30
    start = f"[optiq] The weights take {needed:.2f} GiB in memory, of {limit:.2f} GiB"
    if not runs_whole(model):
        say(f"{start}, and this model cannot be read layer by layer: its layers run in parts")
        return None
    say(f"{start}: reading the model layer by layer")
    return Stream(model, load, to_compute_dtype, scratch or files.cache_dir())


def plan_folder(path_or_repo: str, budget: float, **settings: Any) -> Plan:
    """Load a model as ``mlx_lm.convert`` does and plan it.

    Args:
        path_or_repo: A folder or a Hub repository.
        budget: Bits per weight as mlx-lm prints them.
        settings: dtype, revision and trust_remote_code for `load_unquantized`, the others for
            `study_model`.
    """
    names = ("dtype", "revision", "trust_remote_code")
    source = {name: settings.pop(name) for name in names if name in settings}
    model, tokenizer, digest = load_unquantized(path_or_repo, **source)
    load = partial(reload, path_or_repo, **source)
    return plan_model(model, tokenizer, budget, digest=digest, load=load, **settings)


def load_unquantized(
    path_or_repo: str,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any, str]:
    """Load a model as ``mlx_lm.convert`` does before it quantizes.

    Args:
        path_or_repo: A folder or a Hub repository.
        dtype: As ``mlx_lm.convert --dtype``.
        revision: Of the repository.
        trust_remote_code: As in mlx-lm.

    Returns:
        The model, not evaluated; its tokenizer; and a hash of its files and dtype.

    Raises:
        InputError: The model is quantized already.
    """
    model, tokenizer, config = load(path_or_repo, revision, trust_remote_code)
    if "quantization" in config or "quantization_config" in config:
        raise InputError(
            f"{path_or_repo} is quantized already: convert from its unquantized original"
        )
    cast(model, config, dtype)
    return model, tokenizer, f"{model_digest(local_folder(path_or_repo))}-{dtype}"


def reload(
    path_or_repo: str,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model of `load_unquantized` once more, not evaluated."""
    model, _, config = load(path_or_repo, revision, trust_remote_code)
    cast(model, config, dtype)
    return model


def load(path_or_repo: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, Any, dict]:
    """``mlx_lm.load``, lazily, with its config."""
    import inspect

    import mlx_lm

    extra: dict[str, Any] = {}
    if "trust_remote_code" in inspect.signature(mlx_lm.load).parameters:
        extra["trust_remote_code"] = trust_remote_code
    loaded: Any = mlx_lm.load(
        path_or_repo,
        tokenizer_config={"trust_remote_code": trust_remote_code},
        lazy=True,
        return_config=True,
        revision=revision,
        **extra,
    )
    return loaded


def cast(model: nn.Module, config: dict, dtype: str | None) -> None:
    """Cast a loaded model's parameters as ``mlx_lm.convert`` does before it quantizes."""
    from mlx.utils import tree_map_with_path

    dtype = dtype or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    if dtype not in ("float16", "bfloat16", "float32"):
        return
    keep: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)
    target = getattr(mx, dtype)

    def to_dtype(path: str, value: mx.array) -> mx.array:
        if keep(path) and mx.issubdtype(value.dtype, mx.floating):
            return value.astype(target)
        return value

    model.update(tree_map_with_path(to_dtype, model.parameters()))


def local_folder(path_or_repo: str) -> Path:
    """Where a model's files are after loading."""
    path = Path(path_or_repo)
    if path.exists():
        return path
    from mlx_lm.utils import hf_repo_to_path

    return Path(hf_repo_to_path(path_or_repo))
