"""What a backend cost its vendor, read from its syntax trees; nothing of it is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

from quire.conformance.patches import lines_of_patches
from quire.conformance.records import VendorCost


def cost_of(target: str) -> VendorCost:
    """The cost of the package or module that an entry point's `module:Class` lies in."""
    files = list(files_of(target.partition(":")[0]))
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    modules = {name for tree in trees.values() for name in _quire_imports(tree)}
    own = target.partition(":")[0]
    return VendorCost(
        files=len(files),
        lines_of_code=sum(_code_lines(path) for path in files),
        quire_modules=sorted(m for m in modules if not f"{m}.".startswith(f"{own}.")),
        assignments=[
            f"{path.name}:{line}" for path, tree in trees.items() for line in lines_of_patches(tree)
        ],
    )


def files_of(module: str) -> Iterator[Path]:
    """Every file of the module's package; the module alone where it has none of its own."""
    spec = _spec_of(module)
    if spec is None or spec.origin is None:
        return
    origin = Path(spec.origin)
    is_package = spec.submodule_search_locations is not None
    is_ours = module.startswith("quire.")  # the folder around a module of ours holds other backends
    has_package = (origin.parent / "__init__.py").exists() and not is_ours
    if is_package or has_package:
        yield from sorted(origin.parent.rglob("*.py"))
    else:
        yield origin


def _spec_of(module: str) -> ModuleSpec | None:
    """Where a module lies. Unlike find_spec on a dotted name, imports no package of a vendor's."""
    top, *parts = module.split(".")
    if top == "quire":
        return find_spec(module)
    spec, name = find_spec(top), top
    for part in parts:
        name = f"{name}.{part}"
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec


def _code_lines(path: Path) -> int:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return sum(1 for line in lines if line and not line.startswith("#"))


def _quire_imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "quire":
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "quire")
