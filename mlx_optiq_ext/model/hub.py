"""Where the files of a model or an adapter are: in a folder, or in a repository on the Hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError

CONFIG = "config.json"
#: What a text model is loaded from, and the weights of mlx-whisper's models.
MODEL = (
    "*.json",
    "*.jsonl",
    "*.jinja",
    "*.py",
    "*.tiktoken",
    "*.txt",
    "model*.safetensors",
    "tiktoken.model",
    "tokenizer.model",
    "weights.*",
)
_REPOSITORY = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def find_folder(
    source: str | Path, patterns: Sequence[str] = MODEL, revision: str | None = None
) -> Path:
    """The folder that holds some files; those of a repository are downloaded unless cached.

    Args:
        source: A folder or the name of a Hub repository.
        patterns: Names of the files wanted, as for `fnmatch`. Whether they are there is not
            checked.
        revision: Of the repository.

    Raises:
        InputError: There is no such folder, and no repository that can be read.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not _REPOSITORY.fullmatch(str(source)):
        raise InputError(f"{source} is neither a folder nor the name of a Hub repository")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    name, wanted = str(source), list(patterns)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(
            f"{source} is no folder here and cannot be downloaded ({type(error).__name__}): check "
            "the name and the connection"
        ) from error


def cached_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder that a model was loaded from; nothing is downloaded.

    Raises:
        InputError: The repository is not in the Hub's cache.
    """
    path = Path(source)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    wanted = [CONFIG, "model*.safetensors"]
    try:
        found = snapshot_download(
            str(source), revision=revision, local_files_only=True, allow_patterns=wanted
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{source} is not in the Hub's cache: download it first") from error
    return Path(found)
