import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees the dependencies of this one and downloads nothing."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> "Environment":
        venv.create(folder, symlinks=True)
        made = cls(folder)
        # A path line brings the packages of this environment, but runs none of its .pth files.
        paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        (made.site / "dependencies.pth").write_text("\n".join(paths) + "\n")
        return made

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site(self) -> Path:
        base = {"base": str(self.folder), "platbase": str(self.folder)}
        return Path(sysconfig.get_path("purelib", "venv", base))

    def pip(self, *arguments: str | Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "--quiet"]
        done = subprocess.run([*pip, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def install(self, *what: str | Path) -> None:
        alone = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
        self.pip("install", *alone, *what)


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> Callable[[], Environment]:
    """Makes a fresh virtual environment."""
    return lambda: Environment.create(tmp_path_factory.mktemp("environment") / "venv")


@dataclass(frozen=True)
class Distributions:
    wheel: Path
    sdist: Path


@pytest.fixture(scope="session")
def distributions(tmp_path_factory) -> Distributions:
    """Our sdist, and the wheel built from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Distributions(wheel, sdist)
