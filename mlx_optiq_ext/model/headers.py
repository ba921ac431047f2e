"""Names, shapes and sizes of a model's tensors, from headers only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import files
from ..errors import InputError
from .hub import CONFIG, find_file

#: One stored tensor.
Header = files.StoredTensor
#: Tensor name -> its header.
Headers = Mapping[str, Header]


def read_headers(path_or_repo: str, revision: str | None = None) -> tuple[dict[str, Any], Headers]:
    """The config and the tensor headers of a folder or a Hub repository.

    Of a repository config.json is downloaded; its weight files are asked for their headers only, by
    range requests.

    Raises:
        InputError: There are no safetensors headers to read.
    """
    path = find_file(path_or_repo, CONFIG, revision)
    config = files.read_json(path, files.MODEL_CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"the {CONFIG} of {path_or_repo} is not a JSON object")
    local = Path(path_or_repo).is_dir()
    return config, _local(path.parent) if local else _remote(path_or_repo, revision)


def _local(folder: Path) -> Headers:
    found: dict[str, Header] = {}
    names = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    for path in names:
        found.update(read_file(path))
    if not found:
        raise InputError(
            f"{folder} has no safetensors weights, whose headers a prediction is made from: "
            "convert it with mlx_lm.convert first"
        )
    return found


def read_file(path: Path) -> Headers:
    """The headers of one safetensors file.

    Raises:
        InputError: It is none, is cut off, or its header does not fit it.
    """
    return files.read_header(path).tensors


def _header(dtype: str, shape: Any, offsets: Any) -> Header:
    first, last = offsets
    return Header(dtype, tuple(int(n) for n in shape), int(last) - int(first))


def _remote(repo: str, revision: str | None) -> Headers:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError

    try:
        metadata = HfApi().get_safetensors_metadata(repo, revision=revision)
    except NotASafetensorsRepoError as error:
        raise InputError(
            f"{repo} has no safetensors weights, whose headers a prediction is made from: name a "
            "repository that has"
        ) from error
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise InputError(
            f"the headers of {repo} cannot be read ({type(error).__name__}): check the name and "
            "the connection, or give a local folder"
        ) from error
    return {
        name: _header(info.dtype, info.shape, info.data_offsets)
        for file in metadata.files_metadata.values()
        for name, info in file.tensors.items()
    }
