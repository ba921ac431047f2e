"""Signatures of mlx-lm's source files, read by ast and never imported.

A name is ``"module:qualname"``, for example ``"mlx_lm.server:APIHandler.do_POST"``. Its signature
is a text:

- a function's parameters with their kinds and defaults, without annotations, which change without
  meaning;
- ``"class(bases)"``, or ``"dataclass(bases) (fields)"``;
- ``"attribute"`` for what a class assigns in its body or to ``self`` in a method;
- ``"value"`` for a module's own constant or variable;
- ``"import x.y"`` for a module that it imports, or a name from elsewhere in mlx-lm;
- ``"used"`` for an entry of `REFERENCES`: code or a text that stands in the module.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

MODULES = (
    "mlx_lm",
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
    "mlx_lm.models.llama",
    "mlx_lm.models.pipeline",
    "mlx_lm.models.switch_layers",
    "mlx_lm.perplexity",
    "mlx_lm.quant.awq",
    "mlx_lm.quant.dwq",
    "mlx_lm.quant.dynamic_quant",
    "mlx_lm.quant.gptq",
    "mlx_lm.quant.utils",
    "mlx_lm.server",
    "mlx_lm.tokenizer_utils",
    "mlx_lm.tuner.datasets",
    "mlx_lm.tuner.dora",
    "mlx_lm.tuner.lora",
    "mlx_lm.tuner.trainer",
    "mlx_lm.tuner.utils",
    "mlx_lm.utils",
)
"""The modules that signatures.json covers."""

REFERENCES = (
    "mlx_lm.models.cache:globals",
    "mlx_lm.quant.utils:'.cache/mlx-lm/calibration_v5.txt'",
    "mlx_lm.tuner.trainer:mx.compile",
    "mlx_lm.tuner.trainer:mx.save_safetensors",
)
"""What is looked for inside functions: a dotted name as it is written, or a text in quotes."""

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


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
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for node in _statements(tree.body):
        if isinstance(node, _FUNCTIONS):
            found[node.name] = _signature(node)
        elif isinstance(node, ast.ClassDef):
            found.update(_class_signatures(node, node.name))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            found.update(_imports(node, package))
        else:
            found.update(dict.fromkeys(_assigned(node), "value"))
    return found | dict.fromkeys(_references(tree, module), "used")


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
    body = list(_statements(node.body))
    methods = [each for each in body if isinstance(each, _FUNCTIONS)]
    for attribute in {*_own(methods), *(each for one in body for each in _assigned(one))}:
        yield f"{name}.{attribute}", "attribute"
    for each in body:
        if isinstance(each, ast.ClassDef):
            yield from _class_signatures(each, f"{name}.{each.name}")
    for each in methods:
        decorators = {ast.unparse(it) for it in each.decorator_list}
        # A setter bears its property's name; the property is what counts.
        if f"{each.name}.setter" not in decorators:
            yield f"{name}.{each.name}", _signature(each)


def _own(methods: Iterable[ast.AST]) -> Iterator[str]:
    """Attributes that methods set on ``self``."""
    for method in methods:
        for node in ast.walk(method):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            ):
                yield node.attr


def _assigned(node: ast.stmt) -> Iterator[str]:
    """Names that a statement gives a value, or a dataclass field."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    yield from (each.id for each in targets if isinstance(each, ast.Name))


def _imports(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Import):
        for each in node.names:
            name = each.asname or each.name.partition(".")[0]
            yield name, f"import {each.name if each.asname else name}"
        return
    steps = package.split(".")
    parents = steps[: len(steps) + 1 - node.level] if node.level else []
    source = ".".join([*parents, *([node.module] if node.module else [])])
    if source.partition(".")[0] != "mlx_lm":
        return
    for each in node.names:
        yield each.asname or each.name, f"import {source}.{each.name}"


def _references(tree: ast.Module, module: str) -> Iterator[str]:
    """The entries of `REFERENCES` that occur in a module."""
    wanted = [name for each in REFERENCES for at, _, name in [each.partition(":")] if at == module]
    if not wanted:
        return
    code, texts = set[str](), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            code.add(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(repr(node.value))
    yield from (name for name in wanted if name in code | texts)


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
