"""A process that judges converted models one after another against one reading of the original."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from .process import surroundings

KINDS = Path(__file__).parents[1] / "kinds.py"


class Judge:
    """``kinds.py`` as a child that is started when it is first asked.

    Args:
        model: The original.
        texts: Folder with the texts.
        tokens: Tokens of each kind.
        log: Where what it says on stderr is added.
    """

    def __init__(self, model: Path, texts: Path, tokens: int, log: Path):
        paths = (sys.executable, str(KINDS), str(model), "-", "--texts", str(texts))
        self._command = (*paths, "--tokens", str(tokens))
        self._log = log
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def __call__(self, converted: Path) -> dict[str, Any]:
        """Bits per weight and KL by kind of a converted model; raises if the child has ended."""
        with self._lock:
            child = self._child = self._child or self._started()
            assert child.stdin is not None
            assert child.stdout is not None
            print(converted, file=child.stdin, flush=True)
            answer = child.stdout.readline()
        if not answer:
            raise SystemExit(f"the judge ended with {converted}; see {self._log}")
        found = json.loads(answer)
        return {"bpw": found.pop("bpw"), "kl": {k: v for k, v in found.items() if k != "path"}}

    def _started(self) -> subprocess.Popen[str]:
        with self._log.open("a") as stream:
            return subprocess.Popen(
                self._command,
                env=surroundings({"MLX_OPTIQ_EXT": "0"}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
