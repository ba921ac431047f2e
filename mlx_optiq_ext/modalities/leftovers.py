"""Tensors and files of other modalities in a model folder."""

from pathlib import Path

from .. import files
from ..errors import InputError
from ..model.config import in_tower

#: Files of image, video and audio processors; none of them serves a tokenizer.
PROCESSOR_FILES = (
    "feature_extraction_*.py",
    "image_processing_*.py",
    "preprocessor_config.json",
    "processing_*.py",
    "processor_config.json",
    "video_preprocessor_config.json",
    "video_processing_*.py",
    "*_processor.py",
    "*_vision_processing.py",
)


def tower_tensors(folder: Path) -> dict[str, int]:
    """Bytes of each tensor of a checkpoint that belongs to another modality than text.

    Reads only the headers of ``model*.safetensors``.

    Raises:
        InputError: A file is cut off.
    """
    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        for name, tensor in files.read_header(path).tensors.items():
            if in_tower(name):
                sizes[name] = tensor.nbytes
    return sizes


def remove_processor_files(folder: Path) -> tuple[str, ...]:
    """Remove files that only a processor reads from a converted folder; chat templates stay.

    Returns:
        Names of the removed files.
    """
    found = sorted({p for pattern in PROCESSOR_FILES for p in folder.glob(pattern)})
    for path in found:
        path.unlink()
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.exists():
        config = files.read_json(tokenizer)
        if not isinstance(config, dict):
            raise InputError(f"{tokenizer} is not a JSON object: fetch it again")
        auto_map = config.get("auto_map")
        foreign = config.pop("processor_class", None) is not None
        if isinstance(auto_map, dict):
            foreign |= auto_map.pop("AutoProcessor", None) is not None
        if foreign:
            files.write_json(tokenizer, config)
    return tuple(path.name for path in found)
