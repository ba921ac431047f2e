"""The files of a model: checks that they exist, and that they do not change meanwhile."""

from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn

from .. import files
from ..errors import InputError
from .config import place
from .hub import CONFIG, cached_folder, find_file
from .loading import model_digest, model_files


def check_source(path_or_repo: str, revision: str | None = None) -> None:
    """Refuse a source that is not a model, before anything large is loaded or downloaded.

    Args:
        path_or_repo: A folder or a Hub repository, whose config is downloaded.
        revision: Revision of the repository.

    Raises:
        InputError: There is no such folder or repository, or no model in it.
    """
    path = Path(path_or_repo)
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # such as a name longer than any
        raise InputError(f"{path_or_repo} cannot be read ({error}): name a model") from error
    find_file(path_or_repo, CONFIG, revision)
    if path.is_dir() and not any(path.glob("model*.safetensors")):
        raise InputError(
            f"{path_or_repo} is not a model folder: it has no model*.safetensors; name another one"
        )


@dataclass(frozen=True)
class SourceFiles:
    """The files that a model is read from, to notice when they change.

    Attributes:
        path_or_repo: The folder or repository.
        revision: Revision of the repository.
        states: File -> size, time of change and inode; empty before a repository is downloaded.
        digest: Hash that `load_unquantized` returned for them.
    """

    path_or_repo: str
    revision: str | None
    states: dict[Path, tuple[int, int, int]]
    digest: str = ""

    @classmethod
    def of(cls, path_or_repo: str, revision: str | None = None) -> "SourceFiles":
        """The current state of the files."""
        try:
            folder = cached_folder(path_or_repo, revision)
        except InputError:
            return cls(path_or_repo, revision, {})
        return cls(path_or_repo, revision, _states(folder))

    def check(self) -> None:
        """Refuse files that have changed.

        Raises:
            InputError: A file has changed.
        """
        folder = cached_folder(self.path_or_repo, self.revision)
        if _states(folder) == self.states or self.digest.startswith(model_digest(folder)):
            return
        raise InputError(
            f"the files of {self.path_or_repo} changed while they were converted: nothing was "
            "written; run the command again"
        )


def misread(model: nn.Module, path_or_repo: str, revision: str | None = None) -> str | None:
    """A layer whose 8-bit floating-point weights mlx-lm took for whole numbers.

    Such bytes, multiplied by their scale as they come, give no weight below zero. mlx-lm 0.32.2
    does so in ``ministral3``.

    Args:
        model: As it was loaded; one weight of it is evaluated.
        path_or_repo: The folder or repository that it was loaded from.
        revision: Revision of the repository.

    Returns:
        Its path, or None: no layer is known to be misread.
    """
    modules = dict(model.named_modules())
    for path in model_files(cached_folder(path_or_repo, revision)):
        stored = files.read_header(path).tensors if path.suffix == ".safetensors" else {}
        for name in (name for name, tensor in stored.items() if tensor.dtype == "F8_E4M3"):
            found = place(name, modules)
            if found is not None and "weight" in modules[found]:
                return found if modules[found].weight.min().item() >= 0 else None
    return None


def _states(folder: Path) -> dict[Path, tuple[int, int, int]]:
    found = ((path, path.stat()) for path in model_files(folder))
    return {path: (state.st_size, state.st_mtime_ns, state.st_ino) for path, state in found}
