"""The files that a model is read from: whether there are any, and whether they stay as they are."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from . import local_folder
from .loading import model_digest, model_files


def check_source(path_or_repo: str, revision: str | None = None) -> None:
    """Refuse what cannot be a model, before anything large is loaded or downloaded.

    Args:
        path_or_repo: A folder or a Hub repository, whose config is downloaded.
        revision: Of the repository.

    Raises:
        InputError: There is no such folder or repository, or no model in it.
    """
    path = Path(path_or_repo)
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # such as a name longer than any
        raise no_such_model(path_or_repo, error) from error
    if path.is_dir():
        for pattern in ("config.json", "model*.safetensors"):
            if not any(path.glob(pattern)):
                raise InputError(
                    f"{path_or_repo} is not a model folder: it has no {pattern}; name another one"
                )
        return
    if path.exists():
        raise InputError(f"{path_or_repo} is a file: name the folder of a model")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        hf_hub_download(path_or_repo, "config.json", revision=revision)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise no_such_model(path_or_repo, error) from error


def no_such_model(path_or_repo: str, error: Exception) -> InputError:
    """The error for a model that is neither here nor on the Hub."""
    return InputError(
        f"{path_or_repo}: no such folder, and no Hub repository that could be read "
        f"({type(error).__name__}): check the name and the connection"
    )


@dataclass(frozen=True)
class SourceFiles:
    """The files that a model is read from, to notice when they change.

    Attributes:
        path_or_repo: The folder or repository.
        states: File -> size, time of change and inode; empty before a repository is downloaded.
        digest: Hash that `load_unquantized` returned for them.
    """

    path_or_repo: str
    states: dict[Path, tuple[int, int, int]]
    digest: str = ""

    @classmethod
    def of(cls, path_or_repo: str) -> "SourceFiles":
        """The files as they are now."""
        try:
            folder = local_folder(path_or_repo)
        except (OSError, ValueError):  # not downloaded yet
            return cls(path_or_repo, {})
        return cls(path_or_repo, _states(folder))

    def check(self) -> None:
        """Refuse files that hold something else by now.

        Raises:
            InputError: They do.
        """
        folder = local_folder(self.path_or_repo)
        if _states(folder) == self.states or self.digest.startswith(model_digest(folder)):
            return
        raise InputError(
            f"the files of {self.path_or_repo} changed while they were converted: nothing was "
            "written; run the command again"
        )


def _states(folder: Path) -> dict[Path, tuple[int, int, int]]:
    found = ((path, path.stat()) for path in model_files(folder))
    return {path: (state.st_size, state.st_mtime_ns, state.st_ino) for path, state in found}
