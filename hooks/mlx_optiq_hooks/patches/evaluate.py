"""``mlx_lm.evaluate``: can be imported without lm-eval, which our own tasks may not need.

Stub modules replace lm-eval while that module is imported, and only for a command line with
``--optiq-task``. Afterwards the real lm-eval can be imported if it is installed.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from ..engine import imports

TARGET = "mlx_lm.evaluate"


def requested(argv: Sequence[str]) -> bool:
    """Whether a command line asks for one of our tasks."""
    return any(argument.partition("=")[0] == "--optiq-task" for argument in argv)


def install() -> None:
    """Watch for the import of ``mlx_lm.evaluate``, if our tasks are asked for."""
    if requested(sys.argv):
        imports.load_with(TARGET, _Loader)


class _Loader(imports.Loader):
    """The real loader; the stub modules are in place while it runs the module."""

    def exec_module(self, module: ModuleType) -> None:
        with stand_ins():
            super().exec_module(module)


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Stub modules for what ``mlx_lm.evaluate`` imports from lm-eval in any supported release."""
    made: dict[str, Any] = {
        name: ModuleType(name)
        for name in (
            "lm_eval",
            "lm_eval.api",
            "lm_eval.api.model",
            "lm_eval.api.registry",
            "lm_eval.models",
            "lm_eval.models.huggingface",
        )
    }
    made["lm_eval.api.model"].LM = object
    made["lm_eval.api.registry"].register_model = lambda *names: lambda cls: cls
    made["lm_eval.models.huggingface"].HFLM = type("HFLM", (), {"tokenizer_name": None})
    made["lm_eval.models"].huggingface = made["lm_eval.models.huggingface"]
    # A module that is None in sys.modules blocks its import; it is put back.
    before = {name: sys.modules[name] for name in made if name in sys.modules}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            sys.modules.pop(name, None)
        sys.modules.update(before)
