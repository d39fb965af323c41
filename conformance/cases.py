"""The cases of the suite: checks times variants, with ids that are fixed for ever.

A check is a function of a `Trial`, marked with `check`. Which of its cases a device is excused from
follows from the device's Capabilities and from nothing else. The checks of a module `ext_NAME` are
those of the extension NAME: reported apart from the levels, and never needed for one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from quire.core.interface import OP_SPECS, Capabilities

Function = Callable[..., None]
EXTENSION_PREFIX = "ext_"
"""Begins the name of a module of checks that belong to an extension."""
EXTENSION_FILE = "test_extensions.py"
"""The one test file of all extensions."""
HIGHEST_LEVEL = 4
Needs = Callable[[Capabilities, Mapping[str, Any]], str]
"""Why a device with these claims is excused from a variant; empty: it is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSpec:
    """What `check` writes on a function."""

    level: int
    op: str
    variants: Mapping[str, Mapping[str, Any]]
    needs: Needs
    on_torch: bool
    """Whether it needs tensors of torch on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One check with one set of arguments."""

    id: str
    """`test_l1_attention.py::test_mixed_batch[gqa4-d64-float32]`; part of the interface."""
    level: int
    op: str
    """The operator that it is about, or the subject: `device`, `runner`, `engine`."""
    dtype: str
    function: Function
    arguments: Mapping[str, Any]
    needs: Needs
    on_torch: bool
    extension: str = ""
    """The extension that it belongs to; empty: a level."""

    @property
    def variant(self) -> str:
        """What stands in the brackets of the id."""
        return self.id.partition("[")[2].rstrip("]")

    def reason_against(self, claims: Capabilities, *, is_torch: bool) -> str:
        """Why a device with these claims is excused; empty: it is not.

        `is_torch`: whether torch owns its tensors.
        """
        if self.dtype and self.dtype not in claims.dtypes:
            return f"dtype {self.dtype} is not among the claimed {', '.join(claims.dtypes)}"
        if self.on_torch and not is_torch:
            return "torch does not own this device; what it does is tried through its Worker"
        return self.needs(claims, self.arguments)


def _needs_nothing(claims: Capabilities, arguments: Mapping[str, Any]) -> str:
    del claims, arguments
    return ""


def needs_claim(field: str, name: str) -> Needs:
    """Excuses devices that do not list `name` in this field of their Capabilities."""

    def needs(claims: Capabilities, arguments: Mapping[str, Any]) -> str:
        del arguments
        return "" if name in getattr(claims, field) else f"{name} is not among the claimed {field}"

    return needs


def check(
    *,
    level: int,
    op: str,
    over: Mapping[str, Mapping[str, Any]] | None = None,
    needs: Needs = _needs_nothing,
    on_torch: bool | None = None,
) -> Callable[[Function], Function]:
    """Marks a function as a check, with its variants by id. `op` may be overridden by a variant.

    `on_torch`: whether it needs tensors of torch on the device; None: at level 1.
    """

    def mark(function: Function) -> Function:
        spec = CheckSpec(
            level=level,
            op=op,
            variants=over or {"": {}},
            needs=needs,
            on_torch=level == 1 if on_torch is None else on_torch,
        )
        function.__dict__["conformance"] = spec
        return function

    return mark


def product(*parts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every combination of variants; ids joined by dashes in the order of the parts."""
    combined: dict[str, dict[str, Any]] = {"": {}}
    for part in parts:
        combined = {
            f"{left}-{right}".strip("-"): {**a, **b}
            for left, a in combined.items()
            for right, b in part.items()
        }
    return combined


def dtypes(*names: str) -> dict[str, dict[str, Any]]:
    """Variants of the argument `dtype`; with no name, all of the contract."""
    every = names or tuple(dict.fromkeys(d for spec in OP_SPECS for d in spec.dtypes))
    return {name: {"dtype": name} for name in every}


def cases_of(module: ModuleType) -> tuple[Case, ...]:
    """The cases of one module of checks, in the order in which they are written."""
    name = module.__name__.rpartition(".")[2]
    extension = extension_of(module)
    prefix = f"{EXTENSION_FILE}::test_{extension}_" if extension else f"test_{name}.py::test_"
    functions = [f for f in vars(module).values() if inspect.isfunction(f)]
    marked = [f for f in functions if "conformance" in f.__dict__]
    return tuple(case for function in marked for case in _expand(prefix, function, extension))


def extension_of(module: ModuleType) -> str:
    """The extension that a module of checks is about; empty: levels."""
    name = module.__name__.rpartition(".")[2]
    return name.removeprefix(EXTENSION_PREFIX) if name.startswith(EXTENSION_PREFIX) else ""


def _expand(prefix: str, function: Function, extension: str) -> list[Case]:
    spec: CheckSpec = function.__dict__["conformance"]
    return [
        Case(
            id=f"{prefix}{function.__name__}" + (f"[{variant}]" if variant else ""),
            level=spec.level,
            op=arguments.get("op", spec.op),
            dtype=arguments.get("dtype", ""),
            function=function,
            arguments=arguments,
            needs=spec.needs,
            on_torch=spec.on_torch,
            extension=extension,
        )
        for variant, arguments in spec.variants.items()
    ]


def all_cases(max_level: int = HIGHEST_LEVEL) -> tuple[Case, ...]:
    """Every case of the levels up to one: the manifest."""
    from quire.conformance import checks

    cases = [case for module in checks.MODULES for case in cases_of(module)]
    return tuple(case for case in cases if case.level <= max_level and not case.extension)


def extension_cases(names: Collection[str] | None = None) -> tuple[Case, ...]:
    """The cases of these extensions; None: of every extension that the suite has checks for."""
    from quire.conformance import checks

    modules = [m for m in checks.EXTENSIONS if names is None or extension_of(m) in names]
    return tuple(case for module in modules for case in cases_of(module))
