"""Finds the files of a model or adapter in a folder, or in a repository on the Hub."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError

CONFIG = "config.json"
#: Files of a text model, and weights of mlx-whisper's models.
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
        revision: Revision of the repository.

    Raises:
        InputError: There is no such folder, and no repository that can be read.
    """
    if _is_folder(source):
        return Path(source)
    from huggingface_hub import snapshot_download

    name, wanted = str(source), list(patterns)
    with _download(name):
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


def find_file(source: str | Path, name: str, revision: str | None = None) -> Path:
    """One file of a folder or a Hub repository, which is downloaded unless it is cached.

    Raises:
        InputError: As for `find_folder`, or the file is not there.
    """
    if not _is_folder(source):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            with _download(str(source)):
                return Path(hf_hub_download(str(source), name, revision=revision))
        except InputError as error:
            missing = isinstance(error.__cause__, EntryNotFoundError)
            if not missing or isinstance(error.__cause__, LocalEntryNotFoundError):
                raise  # the connection failed, not the name
            raise InputError(f"{source} has no {name}") from error
    path = Path(source) / name
    if not path.is_file():
        raise InputError(f"{source} has no {name}")
    return path


def _is_folder(source: str | Path) -> bool:
    path = Path(source)
    if not path.is_dir() and (path.exists() or not _REPOSITORY.fullmatch(str(source))):
        raise InputError(f"{source} is not a folder: give a folder or a Hub repository")
    return path.is_dir()


@contextmanager
def _download(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(
            f"{repo}: no such folder, and no repository that could be read "
            f"({type(error).__name__}): check the name and the connection, or give a folder"
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
