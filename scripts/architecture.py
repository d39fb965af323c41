#!/usr/bin/env python3
"""Hold the source to the rules of its architecture, and print its size.

    python scripts/architecture.py [ROOT]

Prints every violation as `path:line: rule: what is wrong`, then the budgets: lines of each room and
the longest functions. Exits with 1 if a rule is broken. A deviation that is meant stands in
tests/architecture/ledger.toml with its reason; an entry that no longer matches is itself a
violation. Needs nothing but the standard library and imports nothing of Quire.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOMS = (
    "quire",
    "core",
    "backends",
    "kernels_cpu",
    "kernels_triton",
    "kernels_cuda",
    "kernels_rocm",
    "conformance",
    "benchmarks",
)
"""The folders that are sub-packages of quire."""

OTHER_FOLDERS = ("examples", "scripts", "docs")
"""Folders whose files obey the rules of length and naming alone."""

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500

VAGUE_NAMES = {"utils", "util", "common", "misc", "helpers", "helper"}

DEVICE_WORDS = {
    *("cuda", "nvidia", "nccl", "cudnn", "cublas"),
    *("rocm", "hip", "amd", "rccl"),
    *("xpu", "hpu", "npu", "tpu", "mps"),
}
"""Words that no file under core/ contains, in code or in prose."""

_LEAVES = ("core.interface", "core.errors", "core.env", "core.sampling_params", "core.outputs")
_BASE = (*_LEAVES, "core.config", "core.source_features")

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "core.interface": (),
    "core.errors": ("core.interface",),
    "core.env": _LEAVES,
    "core.sampling_params": _LEAVES,
    "core.outputs": _LEAVES,
    "core.config": _LEAVES,
    "core.source_features": _LEAVES,
    "core.discovery": _BASE,
    "core.doctor": (*_BASE, "core.discovery"),
    "core.planning": (
        *_BASE,
        "core.discovery",
        "core.kv_cache",
        "core.models.description",
        "core.models.registry",
        "core.models.weights.quantization_spec",
        "core.models.weights.source",
        "core.option_names",
    ),
    "core.option_names": (*_BASE, "core.models.weights.quantization_spec"),
    "core.kv_cache": _BASE,
    "core.scheduler": (*_BASE, "core.kv_cache", "core.structured.spec"),
    "core.executor": (*_BASE, "core.discovery", "core.planning"),
    "core.structured": _BASE,
    "core.engine": (
        *_BASE,
        "core.discovery",
        "core.planning",
        "core.kv_cache",
        "core.scheduler",
        "core.executor",
        "core.structured",
    ),
    "core.models": _BASE,
    "core.worker": (*_BASE, "core.models", "core.structured"),
    "core.serving": (
        *_BASE,
        "core.discovery",
        "core.doctor",
        "core.planning",
        "core.executor",
        "core.structured",
        "core.scheduler",
        "core.kv_cache",
        "core.engine",
        "conformance",
        "benchmarks",
        "demo",
    ),
    "backends": ("core.interface", "kernels_cpu", "kernels_triton", "kernels_cuda", "kernels_rocm"),
    "kernels_cpu": (),
    "kernels_triton": (),
    "kernels_cuda": ("kernels_triton",),
    "kernels_rocm": ("kernels_triton",),
    "conformance": (
        *_BASE,
        "core.discovery",
        "core.planning",
        "core.worker",
        "core.models",
        "core.scheduler",
        "core.engine",
        "core.structured",
    ),
}
"""For each room, the rooms it may import besides itself. What has no row may import anything."""

SHARED_BACKEND_PARTS = ("backends.reference", "backends.torch_accelerator")
"""What every backend may import although it lies in backends/."""

WITHOUT_TORCH = (
    "core.engine",
    "core.scheduler",
    "core.kv_cache",
    "core.executor",
    "core.interface.worker",
)
TORCH_FAMILY = {"torch", "torchvision", "triton"}
"""What those never import, not even inside a function."""

SLOW_TO_IMPORT = {"transformers", "safetensors", "ray", "fastapi"}
"""What those import inside the function that needs it alone, if at all."""


READS_ENVIRONMENT = ("core.env",)
ENVIRONMENT_FREE_ROOMS = tuple(room for room in ROOMS if room != "benchmarks")


@dataclass(frozen=True, slots=True)
class Violation:
    """One place that breaks one rule."""

    rule: str
    where: str
    """The path, or `path:qualified.name` for a function: what the ledger names."""
    line: int
    message: str

    def __str__(self) -> str:
        path = self.where.partition(":")[0]
        return f"{path}:{self.line}: {self.rule}: {self.message}"


@dataclass(frozen=True, slots=True)
class Source:
    """One parsed file."""

    path: str
    """Relative to the root, with slashes."""
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """The dotted name below quire: `core.engine.llm`; `` for quire/__init__.py."""
        parts = list(Path(self.path).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if parts and parts[0] == "quire":
            parts.pop(0)
        return ".".join(parts)

    @property
    def room(self) -> str:
        """The top-level folder."""
        return Path(self.path).parts[0]


def read_sources(root: Path) -> list[Source]:
    """Every Python file of the rooms and the other folders."""
    sources = []
    for folder in (*ROOMS, *OTHER_FOLDERS):
        for path in sorted((root / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            name = path.relative_to(root).as_posix()
            sources.append(Source(name, text, ast.parse(text, filename=name)))
    return sources


# ------------------------------------------------------------------------------------ imports


def imported_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, at the top or inside a function, with its line.

    `from a.b import c` yields `a.b.c`: c may be a module, and a prefix decides either way.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def is_below(module: str, package: str) -> bool:
    """Whether a dotted name is the package or lies in it."""
    return module == package or module.startswith(package + ".")


def row_of(module: str) -> str | None:
    """The longest row of MAY_IMPORT that a module belongs to."""
    rows = [row for row in MAY_IMPORT if is_below(module, row)]
    return max(rows, key=len, default=None)


def home_backend(module: str) -> str:
    """The backend a module belongs to: `backends.cpu.ops` belongs to `backends.cpu`."""
    return ".".join(module.split(".")[:2])


def is_allowed(importer: str, target: str) -> bool:
    """Whether one module of quire may import another."""
    row = row_of(importer)
    if row is None:
        return True
    if row == "backends":
        own = (home_backend(importer), *SHARED_BACKEND_PARTS)
        if any(is_below(target, part) for part in own):
            return True
    elif is_below(target, row):
        return True
    return any(is_below(target, room) for room in MAY_IMPORT[row])


def check_import_directions(source: Source) -> Iterator[Violation]:
    """Who may import whom."""
    if source.room not in ROOMS:
        return
    for name, line in imported_names(source.tree):
        if name.partition(".")[0] in ROOMS and not is_below(name, "quire"):
            message = f"imports bare {name}; the folder {name.partition('.')[0]}/ is quire.{name}"
            yield Violation("import-direction", source.path, line, message)
        if not name.startswith("quire."):
            continue
        target = name.removeprefix("quire.")
        if not is_allowed(source.module, target):
            message = f"quire.{source.module} may not import {name}"
            yield Violation("import-direction", source.path, line, message)


def check_relative_imports(source: Source) -> Iterator[Violation]:
    """Imports are absolute, so that this file can read them."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            yield Violation("import-relative", source.path, node.lineno, "a relative import")


def check_torch_free(source: Source) -> Iterator[Violation]:
    """The scheduler's side of the worker boundary never imports torch."""
    if not any(is_below(source.module, part) for part in WITHOUT_TORCH):
        return
    for name, line in imported_names(source.tree):
        if name.partition(".")[0] in TORCH_FAMILY:
            message = f"quire.{source.module} imports {name}; host data alone crosses the worker"
            yield Violation("torch-free", source.path, line, message)


# -------------------------------------------------------------------------------------- words


def device_words(line: str) -> set[str]:
    """The device words of a line; `torch.cuda`, `is_cuda` and `CudaGraph` all count."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", line)
    return DEVICE_WORDS & {word.lower() for word in re.findall(r"[A-Za-z]+", spaced)}


def check_device_words(source: Source) -> Iterator[Violation]:
    """core/ names no vendor and no device."""
    if source.room != "core":
        return
    for number, line in enumerate(source.text.splitlines(), 1):
        for word in sorted(device_words(line)):
            message = f"names {word!r}; what differs is asked of the Backend"
            yield Violation("device-word", source.path, number, message)


def _is_cpu(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value == "cpu"


def check_device_branches(source: Source) -> Iterator[Violation]:
    """core/ does not ask which device it has: no comparison with "cpu", no `.is_cpu`."""
    if source.room != "core":
        return
    for node in ast.walk(source.tree):
        sides: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            sides += [item for side in sides for item in getattr(side, "elts", ())]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "startswith":
            sides = list(node.args)
        is_question = isinstance(node, ast.Attribute) and node.attr == "is_cpu"
        if is_question or any(_is_cpu(side) for side in sides):
            line = getattr(node, "lineno", 0)
            message = "branches on the device; ask the Backend's Capabilities"
            yield Violation("device-branch", source.path, line, message)


# ------------------------------------------------------------------------- state and environment


def check_no_global(source: Source) -> Iterator[Violation]:
    """No `global` statement."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            message = f"global {', '.join(node.names)}; state has an owner and is handed over"
            yield Violation("global-state", source.path, node.lineno, message)


def check_environment(source: Source) -> Iterator[Violation]:
    """Environment variables are read in one place."""
    if source.room not in ENVIRONMENT_FREE_ROOMS or source.module in READS_ENVIRONMENT:
        return
    for node in ast.walk(source.tree):
        reads = isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "putenv"}
        imports = isinstance(node, ast.ImportFrom) and node.module == "os"
        if imports:
            reads = any(alias.name in {"environ", "getenv", "putenv"} for alias in node.names)
        if reads:
            message = "touches the environment; only core/env.py does"
            yield Violation("environment", source.path, node.lineno, message)


# --------------------------------------------------------------------------------- size and names


def functions(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """The qualified name, the line and the number of lines of every function."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, int, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}"
                if not isinstance(child, ast.ClassDef):
                    yield name, child.lineno, (child.end_lineno or 0) - child.lineno + 1
                yield from visit(child, f"{name}.")
            else:
                yield from visit(child, prefix)

    yield from visit(tree, "")


def check_function_length(source: Source) -> Iterator[Violation]:
    """A function is read without scrolling."""
    for name, line, length in functions(source.tree):
        if length > MAX_FUNCTION_LINES:
            message = f"{name} has {length} lines; at most {MAX_FUNCTION_LINES}"
            yield Violation("function-length", f"{source.path}:{name}", line, message)


def check_file_length(source: Source) -> Iterator[Violation]:
    """A module holds one concept."""
    length = source.text.count("\n")
    if length > MAX_FILE_LINES:
        message = f"{length} lines; at most {MAX_FILE_LINES}: split by question"
        yield Violation("file-length", source.path, 1, message)


def check_vague_name(source: Source) -> Iterator[Violation]:
    """A module is named after what it holds."""
    vague = VAGUE_NAMES & {part.lower() for part in Path(source.path).with_suffix("").parts}
    for name in sorted(vague):
        message = f"{name!r} does not say what is inside"
        yield Violation("vague-name", source.path, 1, message)


RULES = (
    check_import_directions,
    check_relative_imports,
    check_torch_free,
    check_device_words,
    check_device_branches,
    check_no_global,
    check_environment,
    check_function_length,
    check_file_length,
    check_vague_name,
)


# -------------------------------------------------------------------------------------- the whole


def read_ledger(root: Path) -> dict[tuple[str, str], str]:
    """The explained exceptions: (rule, where) -> why."""
    path = root / "tests" / "architecture" / "ledger.toml"
    if not path.is_file():
        return {}
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("exception", [])
    return {(entry["rule"], entry["where"]): entry["why"] for entry in entries}


def violations(root: Path) -> list[Violation]:
    """Every broken rule that the ledger does not explain, and every stale entry of the ledger."""
    found = [one for source in read_sources(root) for rule in RULES for one in rule(source)]
    ledger = read_ledger(root)
    matched = {(one.rule, one.where) for one in found}
    stale = [
        Violation("stale-ledger", "tests/architecture/ledger.toml", 1, f"{rule} at {where} is gone")
        for rule, where in sorted(ledger.keys() - matched)
    ]
    unexplained = [
        Violation("unexplained", "tests/architecture/ledger.toml", 1, f"{where}: no reason given")
        for (_, where), why in sorted(ledger.items())
        if not why.strip()
    ]
    return [one for one in found if (one.rule, one.where) not in ledger] + stale + unexplained


def print_budgets(root: Path) -> None:
    """Lines of each room and the longest functions: growth is discussed, not discovered."""
    sources = read_sources(root)
    lines: dict[str, int] = {}
    longest = []
    for source in sources:
        lines[source.room] = lines.get(source.room, 0) + source.text.count("\n")
        longest += [(size, f"{source.path}:{name}") for name, _, size in functions(source.tree)]
    print("lines:", ", ".join(f"{room} {count}" for room, count in lines.items()))
    print("longest functions:")
    for size, name in sorted(longest, reverse=True)[:5]:
        print(f"  {size:3d}  {name}")
    print("longest files:")
    for source in sorted(sources, key=lambda one: -one.text.count("\n"))[:5]:
        print(f"  {source.text.count(chr(10)):3d}  {source.path}")


def main() -> None:
    """Check one tree and say what is wrong."""
    default = Path(__file__).resolve().parent.parent
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else default
    found = violations(root)
    for one in found:
        print(one)
    print_budgets(root)
    if found:
        sys.exit(f"{len(found)} violations of the architecture")


if __name__ == "__main__":
    main()
