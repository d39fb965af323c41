"""Which torch is installed, read from its files: importing it takes seconds, and loads drivers."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

_MIN_TRITON = (3, 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchBuild:
    """The fields of torch's version module."""

    fields: dict[str, str | None] = field(default_factory=dict)
    """`__version__`, `cuda`, `hip`, `xpu`; empty: torch is not installed."""

    @property
    def version(self) -> str:
        """`2.11.0+cu128`; empty: not installed."""
        return self.fields.get("__version__") or ""

    def runtime(self, build_field: str) -> tuple[int, int] | None:
        """The version of a vendor's runtime that torch was built for; None: for another vendor."""
        text = self.fields.get(build_field)
        if not text:
            return None
        parts = [int(part) for part in text.split(".")[:2] if part.isdecimal()]
        return (parts[0] if parts else 0, parts[1] if len(parts) > 1 else 0)


def read_torch_build() -> TorchBuild:
    """The torch that this process would import."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return TorchBuild()
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
        return TorchBuild(fields=_strings(ast.parse(text)))
    except (OSError, SyntaxError, ValueError):
        return TorchBuild()


def _strings(tree: ast.Module) -> dict[str, str | None]:
    """The top-level names that are strings or None."""
    fields: dict[str, str | None] = {}
    for node in tree.body:
        value = getattr(node, "value", None)
        if not isinstance(value, ast.Constant) or not isinstance(value.value, str | None):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        fields.update({t.id: value.value for t in targets if isinstance(t, ast.Name)})
    return fields


def problem_with_triton() -> tuple[str, str]:
    """(problem, remedy) where Triton is missing or too old; empty strings where it is fine."""
    from importlib.metadata import PackageNotFoundError, version

    if find_spec("triton") is None:
        return "Triton is not installed", "pip install 'triton>=3.6'"
    try:
        text = version("triton")
    except PackageNotFoundError:  # vendors ship it under other names
        return "", ""
    parts = tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())
    if parts >= _MIN_TRITON:
        return "", ""
    return f"Triton {text} is older than 3.6", "pip install 'triton>=3.6'"
