"""What a backend cost its vendor, read from its syntax trees; nothing of it is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from quire.conformance.records import VendorCost


def cost_of(target: str) -> VendorCost:
    """The cost of the package or module that an entry point's `module:Class` lies in."""
    files = list(_files(target.partition(":")[0]))
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    modules = {name for tree in trees.values() for name in _quire_imports(tree)}
    own = target.partition(":")[0]
    return VendorCost(
        files=len(files),
        lines_of_code=sum(_code_lines(path) for path in files),
        quire_modules=sorted(m for m in modules if not f"{m}.".startswith(f"{own}.")),
        assignments=[
            f"{path.name}:{line}" for path, tree in trees.items() for line in _patches(tree)
        ],
    )


def _files(module: str) -> Iterator[Path]:
    """The module's package: every file of the folder that holds it, if that is the vendor's own."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return
    origin = Path(spec.origin)
    is_package = spec.submodule_search_locations is not None
    has_package = (origin.parent / "__init__.py").exists() and not is_package
    if is_package or has_package:
        yield from sorted(origin.parent.rglob("*.py"))
    else:
        yield origin


def _code_lines(path: Path) -> int:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return sum(1 for line in lines if line and not line.startswith("#"))


def _quire_imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "quire":
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "quire")


def _names_from_quire(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "quire":
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {
                alias.asname or "quire"
                for alias in node.names
                if alias.name.split(".")[0] == "quire"
            }
    return names


def _patches(tree: ast.AST) -> Iterator[int]:
    """Lines that assign to an attribute of something imported from Quire."""
    names = _names_from_quire(tree)
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            targets = [ast.Attribute(value=node.args[0], attr="", lineno=node.lineno)]
        for target in targets:
            if isinstance(target, ast.Attribute) and _root(target) in names:
                yield target.lineno


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
