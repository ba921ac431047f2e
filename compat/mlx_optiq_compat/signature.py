"""Signatures of mlx-lm's functions, read from source and compared with the recorded ones.

A target is ``"module:qualname"``, for example ``"mlx_lm.server:APIHandler.do_POST"``. Its signature
is text: parameter names, kinds and defaults, without annotations, which change without meaning.
Classes are recorded with their bases (dataclasses with their fields), module constants as
``"value"``, and ``"module:argparse"`` as ``"import"``: our flags replace that name in the module.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from .matrix import supported
from .version import package_folder

MODULES = (
    "mlx_lm.benchmark",
    "mlx_lm.cache_prompt",
    "mlx_lm.chat",
    "mlx_lm.cli",
    "mlx_lm.convert",
    "mlx_lm.evaluate",
    "mlx_lm.fuse",
    "mlx_lm.generate",
    "mlx_lm.lora",
    "mlx_lm.models.base",
    "mlx_lm.models.cache",
    "mlx_lm.perplexity",
    "mlx_lm.quant.awq",
    "mlx_lm.quant.dwq",
    "mlx_lm.quant.dynamic_quant",
    "mlx_lm.quant.gptq",
    "mlx_lm.quant.utils",
    "mlx_lm.server",
    "mlx_lm.tuner.dora",
    "mlx_lm.tuner.lora",
    "mlx_lm.tuner.trainer",
    "mlx_lm.tuner.utils",
    "mlx_lm.utils",
)
"""The modules that signatures.json covers."""

FILE = Path(__file__).with_name("signatures.json")

Recorded = dict[str, dict[str, str]]
"""Target to signature to the releases that have it, as in signatures.json."""

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def matching(targets: Iterable[str]) -> list[str]:
    """Compare the installed mlx-lm with the recorded signatures.

    The source files are read, never imported.

    Args:
        targets: What a feature patches, as ``"module:qualname"``.

    Returns:
        One sentence per target that is missing or looks like no supported release; empty when
        every target matches one.

    Raises:
        ValueError: A target is not of the form ``"module:qualname"``.
    """
    folder = package_folder()
    complaints: list[str] = []
    live: dict[str, dict[str, str]] = {}
    for target in targets:
        module, colon, qualname = target.partition(":")
        if not (module and colon and qualname):
            raise ValueError(f"not a target: {target!r}; expected 'module:qualname'")
        if folder is None:
            complaints.append(f"{target} is missing: mlx-lm is not installed")
            continue
        if module not in live:
            try:
                live[module] = module_signatures(folder, module)
            except (OSError, SyntaxError, ValueError) as error:
                complaints.append(f"{target} is missing: {module} cannot be read ({error})")
                continue
        complaint = _complaint(target, live[module].get(qualname))
        if complaint:
            complaints.append(complaint)
    return complaints


def module_signatures(folder: Path, module: str) -> dict[str, str]:
    """The signatures of one module, read from its source file.

    Args:
        folder: The mlx_lm package.
        module: The full name, for example ``"mlx_lm.models.cache"``.

    Returns:
        Qualified name to signature.

    Raises:
        OSError: The module has no source file.
        SyntaxError: This Python cannot parse it.
    """
    path = folder.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")
    found: dict[str, str] = {}
    for node in _statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, _FUNCTIONS):
            found[node.name] = _signature(node)
        elif isinstance(node, ast.ClassDef):
            found.update(_class_signatures(node, node.name))
        elif isinstance(node, ast.Import):
            if any(each.name == "argparse" and not each.asname for each in node.names):
                found["argparse"] = "import"
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update({each.id: "value" for each in targets if isinstance(each, ast.Name)})
    return found


def package_signatures(folder: Path) -> dict[str, str]:
    """The signatures of every module in ``MODULES`` that the package has.

    Args:
        folder: The mlx_lm package.

    Returns:
        Target to signature.

    Raises:
        SyntaxError: This Python cannot parse a module.
    """
    found: dict[str, str] = {}
    for module in MODULES:
        try:
            signatures = module_signatures(folder, module)
        except FileNotFoundError:
            continue  # mlx_lm.cli, for one, came in 0.30.6
        found.update({f"{module}:{name}": each for name, each in signatures.items()})
    return found


@cache
def recorded() -> tuple[tuple[str, ...], Recorded]:
    """The releases that signatures.json covers, oldest first, and what it says of each target."""
    data = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(data["releases"]), data["signatures"]


def spans(versions: Iterable[str], releases: tuple[str, ...]) -> str:
    """Shorten a list of releases: ``"0.30.4..0.31.3, 0.32.1.."``.

    A span without an end lasts to the newest release recorded, so that recording one more
    touches only the lines that changed.

    Args:
        versions: Some of the releases.
        releases: All releases, oldest first.

    Returns:
        The spans, separated by commas.
    """
    wanted, parts, start = set(versions), list[str](), None
    for index, each in enumerate(releases):
        if each not in wanted:
            continue
        start = start or each
        if index == len(releases) - 1:
            parts.append(f"{start}..")
        elif releases[index + 1] not in wanted:
            parts.append(each if start == each else f"{start}..{each}")
            start = None
    return ", ".join(parts)


def unspan(text: str, releases: tuple[str, ...]) -> set[str]:
    """The releases that a text from ``spans`` stands for.

    Raises:
        ValueError: It names a release that is not recorded.
    """
    found: set[str] = set()
    for part in filter(None, text.split(", ")):
        first, dots, last = part.partition("..")
        end = releases.index(last) if last else len(releases) - 1
        found.update(releases[releases.index(first) : end + 1] if dots else [first])
    return found


def of_release(version: str) -> dict[str, str]:
    """What signatures.json says of one release.

    Args:
        version: A recorded release.

    Returns:
        Target to signature; empty when the release was not recorded.
    """
    releases, signatures = recorded()
    return {
        target: signature
        for target, each in signatures.items()
        for signature, text in each.items()
        if version in unspan(text, releases)
    }


def _complaint(target: str, live: str | None) -> str | None:
    releases, signatures = recorded()
    rows = {row.mlx_lm for row in supported()}
    known = {
        signature: text
        for signature, text in signatures.get(target, {}).items()
        if rows & unspan(text, releases)
    }
    if live is None:
        return f"{target} is missing: the installed mlx-lm does not define it"
    if not known:
        return f"{target} was never recorded for a supported mlx-lm"
    if live in known:
        return None
    signature, text = list(known.items())[-1]
    return f"{target} has changed: it is {live}, but was {signature} in mlx-lm {text}"


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    # Definitions also sit in module-level `if` and `try`.
    for node in body:
        if isinstance(node, ast.If):
            yield from _statements([*node.orelse, *node.body])
        elif isinstance(node, ast.Try):
            yield from _statements([*node.body, *node.orelse, *node.finalbody])
        else:
            yield node


def _class_signatures(node: ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    bases = ", ".join(ast.unparse(each) for each in node.bases)
    text = f"class({bases})"
    if any("dataclass" in ast.unparse(each) for each in node.decorator_list):
        fields = (each for each in node.body if isinstance(each, ast.AnnAssign))
        shown = (
            ast.unparse(e.target) + (f"={ast.unparse(e.value)}" if e.value else "") for e in fields
        )
        text = f"dataclass({bases}) ({', '.join(shown)})"
    yield name, text
    for each in _statements(node.body):
        if isinstance(each, ast.ClassDef):
            yield from _class_signatures(each, f"{name}.{each.name}")
        elif isinstance(each, _FUNCTIONS):
            decorators = {ast.unparse(it) for it in each.decorator_list}
            # A setter bears its property's name; the property is what counts.
            if f"{each.name}.setter" not in decorators:
                yield f"{name}.{each.name}", _signature(each)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    arguments = node.args
    everything = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    for each in (*everything, arguments.vararg, arguments.kwarg):
        if each is not None:
            each.annotation = None
    # These change how a wrapper is called; other decorators do not.
    decorators = [ast.unparse(each) for each in node.decorator_list]
    kinds = [
        f"@{each} " for each in decorators if each in {"property", "staticmethod", "classmethod"}
    ]
    asynchronous = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{''.join(kinds)}{asynchronous}({ast.unparse(arguments)})"
