"""Finds an adapter's files in a folder, or in a repository on the Hub."""

import hashlib
import re
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import files
from ...errors import InputError
from ...model.config import place
from ...model.hub import find_folder

CONFIG = "adapter_config.json"
NOTES = "optiq_lora_config.json"
MLX_LM_WEIGHTS = "adapters.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"

#: Types of matrices, as safetensors names them.
FLOATS = ("F16", "BF16", "F32")

#: Largest accepted scale of an adapter; usual ones are below a hundred.
HIGHEST_SCALE = 1e6

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Files:
    """An adapter's folder.

    Attributes:
        source: As the user wrote it.
        folder: Holds the files.
        weights: The tensors' file.
        config: ``adapter_config.json``.
        notes: ``optiq_lora_config.json``, or nothing.
    """

    source: str
    folder: Path
    weights: Path
    config: Mapping[str, Any]
    notes: Mapping[str, Any]


def locate(source: str | Path) -> Files:
    """Find an adapter's files; a repository is downloaded unless it is cached.

    Raises:
        InputError: There is no adapter, or a file of it is missing.
    """
    folder = folder_of(source)
    config = _object(folder / CONFIG, source)
    notes = _object(folder / NOTES, source) if (folder / NOTES).exists() else {}
    known = {
        MLX_LM_WEIGHTS: "lora_parameters" in config or "fine_tune_type" in config,
        PEFT_WEIGHTS: "peft_type" in config,
    }
    for name, described in known.items():
        if described and (folder / name).is_file():
            return Files(str(source), folder, folder / name, config, notes)
    present = [name for name in known if (folder / name).is_file()]
    if present:
        raise InputError(
            f"{source}: {CONFIG} has neither mlx-lm's lora_parameters nor PEFT's peft_type that "
            f"go with {present[0]}: was it taken from another adapter?"
        )
    if (folder / "adapter_model.bin").exists():
        raise InputError(
            f"{source} has its weights in adapter_model.bin, which can run code when read: save it "
            "again with safe_serialization=True"
        )
    raise InputError(
        f"{source} has no {MLX_LM_WEIGHTS} and no {PEFT_WEIGHTS}: name the folder of a trained "
        "adapter"
    )


def digest(source: str | Path) -> str:
    """Digest of an adapter's files, to compare them with another host's copy.

    Raises:
        InputError: There is no adapter, or a file of it is missing or cannot be read.
    """
    found = locate(source)
    total = hashlib.sha256()
    for path in (found.weights, found.folder / CONFIG, found.folder / NOTES):
        try:
            with path.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        except FileNotFoundError:
            total.update(b"none")
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror})") from error
    return total.hexdigest()[:12]


def folder_of(source: str | Path) -> Path:
    """The folder of an adapter, which a repository is downloaded into."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{source} is a file: name the folder that holds the adapter")
    name = str(source)
    if not _REPOSITORY.fullmatch(name):
        raise InputError(f"{source}: no such folder, and no name of a repository on the Hub")
    return find_folder(name, [CONFIG, NOTES, MLX_LM_WEIGHTS, PEFT_WEIGHTS])


def _object(path: Path, source: str | Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"{source} has no {path.name}: name the folder of a trained adapter")
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object: is it damaged?")
    return content


def readable_by_stock(
    source: str | Path, modules: Callable[[], AbstractSet[str]] | None = None
) -> bool:
    """Whether mlx-lm's own loading should read an adapter, or report what is wrong with it.

    mlx-lm reads folders with its own ``lora_parameters`` and one rank for all layers. It does not
    read PEFT's form, different ranks, or the Hub, and it accepts values that are not usable.

    Args:
        source: A folder, or a repository on the Hub.
        modules: Returns the paths of the model's modules. mlx-lm does not find layers that the
            model has under another wrapper's prefix.
    """
    folder = Path(source)
    if not folder.exists():
        return not _REPOSITORY.fullmatch(str(source))
    if not (folder / CONFIG).is_file() or (folder / NOTES).exists():
        return not (folder / NOTES).exists()
    try:
        config = files.read_json(folder / CONFIG)
    except InputError:
        return False  # such as NaN, which mlx-lm would accept
    if not isinstance(config, dict) or config.get("fine_tune_type") == "full":
        return True
    own = "lora_parameters" in config and (folder / MLX_LM_WEIGHTS).is_file()
    if "peft_type" in config and not own:
        return False
    return _usual_scale(config) and _usual_tensors(folder / MLX_LM_WEIGHTS, config, modules)


def _usual_scale(config: Mapping[str, Any]) -> bool:
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    return not isinstance(scale, int | float) or abs(scale) <= HIGHEST_SCALE


def _usual_tensors(
    path: Path, config: Mapping[str, Any], modules: Callable[[], AbstractSet[str]] | None
) -> bool:
    """Whether the tensors have one rank, real numbers, and the model's own paths."""
    try:
        stored = files.read_header(path).tensors
    except InputError:
        return True
    first = {n.removesuffix(".lora_a"): t for n, t in stored.items() if n.endswith(".lora_a")}
    shapes = [tensor.shape for tensor in first.values() if tensor.shape]
    ranks = {shape[1] if len(shape) == 3 else shape[-1] for shape in shapes}
    if len(ranks) > 1 or any(tensor.dtype not in FLOATS for tensor in stored.values()):
        return False
    if config.get("fine_tune_type") == "dora" and any(f"{each}.m" not in stored for each in first):
        return False
    if modules is None:
        return True
    known = modules()
    return not any(each not in known and place(each, known) for each in first)
