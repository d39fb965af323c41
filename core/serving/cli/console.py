"""Where the command line writes: results to stdout, the rest to stderr, colours for people only."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

from quire.core.errors import PluginError, QuireError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PIPE_WIDTH = 160
"""Of tables that no terminal shows: wide enough that no name is cut."""


def out() -> Console:
    """For results."""
    return _console(sys.stdout)


def err() -> Console:
    """For progress, explanations and errors."""
    return _console(sys.stderr)


def show_error(error: QuireError) -> None:
    """One message on stderr, in a frame where a person looks at it."""
    console = err()
    text = str(error)
    if isinstance(error, PluginError) and error.details:
        text += "\n(--debug shows the traceback of the plug-in)"
    if not console.is_terminal:
        sys.stderr.write(f"quire: error: {text}\n")
        return
    from rich.panel import Panel
    from rich.text import Text

    console.print(Panel(Text(text), title=type(error).__name__, border_style="red", expand=False))


def write_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    """A table of plain texts; nothing in them is read as markup."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    return made


def size(num_bytes: int) -> str:
    """Bytes as people read them."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes >= 1 << shift:
            return f"{num_bytes / (1 << shift):.2f} {unit}"
    return f"{num_bytes} B"


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(file=stream, highlight=False, width=width)
