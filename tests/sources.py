"""The three packages as source: their modules, and what each imports, read by ast."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "mlx_optiq_ext": ROOT / "mlx_optiq_ext",
    "mlx_optiq_hooks": ROOT / "hooks" / "mlx_optiq_hooks",
    "mlx_optiq_compat": ROOT / "compat" / "mlx_optiq_compat",
}
#: Full name of every module -> its file.
MODULES = {
    ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(
        ".__init__"
    ): path
    for package, folder in PACKAGES.items()
    for path in folder.rglob("*.py")
}


def parsed(path):
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(module, *, top_only=False):
    """The full names of what a module imports; ``from x import y`` gives ``x.y``.

    With ``top_only``, only what an import of the module itself runs.
    """
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in _nodes(parsed(path)) if top_only else ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level]
            stem = [*(base if node.level else []), *([node.module] if node.module else [])]
            yield from (".".join([*stem, each.name]) for each in node.names)


def _nodes(body):
    # What runs when the module is imported: not functions, nor what only a type checker reads.
    for node in ast.iter_child_nodes(body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _nodes(node)


def of(package):
    """The modules of a package."""
    return [module for module in MODULES if module.split(".")[0] == package]


def module_of(name):
    """The module of ours that a full name is, or is in; None for others'."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def circles(graph):
    """What is left of a graph, {node: nodes}, once leaves are taken off: its circles."""
    graph = {node: set(needs) - {node} for node, needs in graph.items()}
    while leaves := {node for node, needs in graph.items() if not needs}:
        graph = {node: needs - leaves for node, needs in graph.items() if node not in leaves}
    return graph
