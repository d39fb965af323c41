"""Finds in a syntax tree what changes objects of Quire from outside: patches.

What is not seen: code that is not Python, and names that are made at run time.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

_SETTERS = {"setattr", "delattr", "__setattr__", "__delattr__"}
_WRITERS = {"update", "setdefault", "pop", "popitem", "clear", "append", "extend", "insert"}
_PATCHERS = {"patch", "object", "dict", "multiple"}


def lines_of_patches(tree: ast.AST) -> list[int]:
    """Lines that assign to, delete from or write into something imported from Quire."""
    names = _names_from_quire(tree)
    found = {node.lineno for node in ast.walk(tree) for node in _patches(node, names)}
    return sorted(found)


def imports_of_quire(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module or name of Quire that a file imports, dotted, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_quire(node.module):
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names if _is_quire(a.name))
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"}:
            yield from ((name, node.lineno) for name in _texts(node) if _is_quire(name))


def _names_from_quire(tree: ast.AST) -> set[str]:
    """Names bound by imports from Quire, and plain aliases of them."""
    names = {"quire"}
    aliases: list[tuple[str, ast.expr]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_quire(node.module):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.asname or "quire" for a in node.names if _is_quire(a.name)}
        elif isinstance(node, ast.Assign):
            aliases += [(t.id, node.value) for t in node.targets if isinstance(t, ast.Name)]
    for _ in aliases:  # an alias of an alias needs another round
        names |= {name for name, value in aliases if _root(value) in names}
    return names


def _patches(node: ast.AST, names: set[str]) -> Iterator[ast.expr]:
    if isinstance(node, ast.Call):
        if _is_patching_call(node, names):
            yield node
        return
    for target in _targets(node):
        if isinstance(target, (ast.Attribute, ast.Subscript)) and (
            _root(target) in names or _is_module_table(target)
        ):
            yield target


def _targets(node: ast.AST) -> Iterator[ast.expr]:
    """What a statement writes to, tuples taken apart."""
    outer: list[ast.expr] = []
    if isinstance(node, (ast.Assign, ast.Delete)):
        outer = node.targets
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.For)):
        outer = [node.target]
    for target in outer:
        yield from (n for n in ast.walk(target) if isinstance(getattr(n, "ctx", None), _WRITES))  # type: ignore[misc]


_WRITES = (ast.Store, ast.Del)


def _is_patching_call(call: ast.Call, names: set[str]) -> bool:
    called = _called(call)
    if called in _SETTERS or (called in _PATCHERS and _is_mock(call.func)):
        is_named = any(_is_quire(text) for text in _texts(call)[:1])
        return is_named or bool(call.args and _root(call.args[0]) in names)
    if called in _WRITERS and isinstance(call.func, ast.Attribute):
        return _root(call.func.value) in names and not _is_own_instance(call.func.value)
    return False


def _is_mock(function: ast.expr) -> bool:
    return "patch" in {n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)} | {
        n.id for n in ast.walk(function) if isinstance(n, ast.Name)
    }


def _is_own_instance(value: ast.expr) -> bool:
    """`ReferenceOps().rows.update(...)` writes into an object of the vendor's own making."""
    return any(
        isinstance(node, ast.Call) and _called(node) not in {"vars", "getattr"}
        for node in ast.walk(value)
    )


def _is_module_table(target: ast.expr) -> bool:
    """`sys.modules["quire.core..."] = ...`."""
    return (
        isinstance(target, ast.Subscript)
        and isinstance(target.value, ast.Attribute)
        and target.value.attr == "modules"
        and isinstance(target.slice, ast.Constant)
        and _is_quire(target.slice.value)
    )


def _root(node: ast.expr) -> str:
    """The name that a chain of attributes and subscripts begins with, also through vars(...)."""
    while True:
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        elif isinstance(node, ast.Call) and _called(node) in {"vars", "getattr"} and node.args:
            node = node.args[0]
        else:
            return node.id if isinstance(node, ast.Name) else ""


def _called(call: ast.Call) -> str:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _texts(call: ast.Call) -> list[str]:
    return [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]


def _is_quire(name: object) -> bool:
    return isinstance(name, str) and name.split(".")[0] == "quire"
