"""`quire bench`: measures, prints a table, and writes JSON that says on what it was measured."""

from __future__ import annotations

import typer

from quire.core.serving.cli.bench.latency import latency
from quire.core.serving.cli.bench.quality import quality
from quire.core.serving.cli.bench.serve import serve
from quire.core.serving.cli.bench.throughput import throughput

bench = typer.Typer(
    no_args_is_help=True,
    help="Measure throughput, latency, a running server, or what a precision costs.",
)
for command in (throughput, latency, serve, quality):
    bench.command()(command)

__all__ = ["bench"]
