"""The text the demo model learns from: what every CPython install carries.

Sources are the standard library without its tests and without tables of data, and the topics of
`help()`. Nothing is downloaded. A document is held out by a fixed hash of the file it comes from,
so no run ever trains on what another run is measured with.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 32
EXCLUDED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
)
TABLE_FILES = re.compile(
    r"(_sysconfigdata.*|topics|entities|schema|sequence|lib2to3/pgen2/token)\.py$"
)
MAX_DIGIT_SHARE = 0.12
"""A file with more digits than this is a table (code pages, Unicode ranges), not a program."""
MIN_SNIPPET_LINES = 3
MAX_SNIPPET_CHARS = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One module of the standard library."""

    path: str
    """Relative to the library's root, with forward slashes: `json/decoder.py`."""
    text: str

    @property
    def module(self) -> str:
        """The dotted name the module is imported by."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A function or class cut out of a source file."""

    file: str
    name: str
    signature: str
    """`name(arguments)` for a function, the bare name for a class."""
    is_class: bool
    docstring: str | None
    source: str
    """Dedented, decorators included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """One page of `help()`: a key as `assert` or `TRUTHVALUE`, and plain text."""

    name: str
    text: str


def is_held_out(key: str) -> bool:
    """Whether the document of this key is measured with and never trained on."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def standard_library_root() -> Path:
    """Where the running interpreter keeps its library."""
    return Path(sysconfig.get_path("stdlib"))


def read_source_files(root: Path) -> tuple[SourceFile, ...]:
    """Every program below `root`, in the order of its path, without tests and tables."""
    files = (_read_source_file(root, path) for path in sorted(root.rglob("*.py")))
    return tuple(file for file in files if file is not None)


def read_topics() -> tuple[Topic, ...]:
    """The pages of `help()` that ship with the interpreter."""
    pages = importlib.import_module("pydoc_data.topics").topics
    return tuple(Topic(name=name, text=pages[name].strip() + "\n") for name in sorted(pages))


def fingerprint(texts: Sequence[str]) -> str:
    """sha256 over all texts, so that a record can say which corpus it was."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def definitions_of(file: SourceFile) -> Iterator[Definition]:
    """The functions, methods and classes of a file that are short enough to be shown whole."""
    try:
        tree = ast.parse(file.text)
    except SyntaxError:
        return
    lines = file.text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield _cut_definition(file, node, lines)


def is_snippet(definition: Definition) -> bool:
    """Whether a definition is worth a document of its own: a few lines, not a page."""
    num_lines = definition.source.count("\n")
    return num_lines >= MIN_SNIPPET_LINES and len(definition.source) <= MAX_SNIPPET_CHARS


def _read_source_file(root: Path, path: Path) -> SourceFile | None:
    relative = path.relative_to(root)
    if EXCLUDED_DIRECTORIES.intersection(relative.parts[:-1]):
        return None
    if TABLE_FILES.search(relative.as_posix()):
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    if not text.strip() or _digit_share(text) > MAX_DIGIT_SHARE:
        return None
    return SourceFile(path=relative.as_posix(), text=text)


def _digit_share(text: str) -> float:
    return sum(map(text.count, "0123456789")) / len(text)


def _cut_definition(
    file: SourceFile,
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef,
    lines: list[str],
) -> Definition:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    source = textwrap.dedent("".join(lines[first - 1 : node.end_lineno])).rstrip() + "\n"
    is_class = isinstance(node, ast.ClassDef)
    signature = node.name if isinstance(node, ast.ClassDef) else f"{node.name}({_arguments(node)})"
    return Definition(
        file=file.path,
        name=node.name,
        signature=signature,
        is_class=is_class,
        docstring=ast.get_docstring(node),
        source=source,
    )


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return ast.unparse(node.args)
