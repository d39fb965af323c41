"""`quire conformance`: run the suite that certifies a device, and read its reports."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quire.core.errors import ConfigError
from quire.core.serving.cli.console import write_json

if TYPE_CHECKING:
    from quire.conformance.records import Report

conformance = typer.Typer(
    name="conformance", help="Certify a device with the conformance suite.", no_args_is_help=True
)


def _require_extra() -> None:
    missing = [name for name in ("pytest", "xdist", "torch") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the conformance suite needs {', '.join(missing)}; install them with "
            'pip install "quire[conformance,torch]"'
        )


@conformance.command()
def run(
    backend: Annotated[str, typer.Option(help="The backend, as in `quire backends`.")],
    level: Annotated[
        int,
        typer.Option(
            help="The highest level to run: 0 boots, 1 kernels, 2 runner, 3 engine, 4 scale. "
            "3 is the highest that one device can reach; 4 needs a claim to several."
        ),
    ] = 3,
    extensions: Annotated[
        str, typer.Option(help="Extensions to try, reported apart: all, none or NAME,...")
    ] = "all",
    workers: Annotated[int, typer.Option("-n", "--workers", help="Parallel processes.")] = 1,
    expectations: Annotated[
        Path | None, typer.Option(help="A TOML file of tests that are known to fail.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="A folder for the report.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="An earlier report.json to compare with.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The run's seed; default: drawn.")] = None,
) -> None:
    """Run the sealed suite on a device. Ends with 1 if a level is not granted."""
    _require_extra()
    from quire.conformance.reporting import read_report
    from quire.conformance.run import run_suite

    result = run_suite(
        backend,
        level=level,
        extensions=extensions,
        workers=workers,
        seed=seed,
        expectations=expectations,
        folder=report,
        baseline=read_report(baseline) if baseline else None,
    )
    _show(result)
    if not result.is_passed:
        raise typer.Exit(1)


@conformance.command()
def verify(path: Annotated[Path, typer.Argument(help="A report.json.")]) -> None:
    """Check that a report is complete, unmodified and honest. Ends with 1 if not."""
    _require_extra()
    from quire.conformance.reporting import read_report
    from quire.conformance.verification import verify as find

    findings = find(path)
    for finding in findings:
        typer.echo(f"{path}: {finding}", err=True)
    if findings:
        raise typer.Exit(1)
    typer.echo(f"{path}: complete, unmodified and honest. {read_report(path).headline}")


@conformance.command()
def report(
    path: Annotated[Path, typer.Argument(help="A report.json.")],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    baseline: Annotated[Path | None, typer.Option(help="An earlier report.json.")] = None,
) -> None:
    """Make the HTML page of a report."""
    _require_extra()
    from quire.conformance.page import render
    from quire.conformance.reporting import read_report

    before = read_report(baseline) if baseline else None
    output.write_text(render(read_report(path), before), encoding="utf-8")
    typer.echo(f"wrote {output}")


@conformance.command()
def matrix(
    paths: Annotated[list[Path], typer.Argument(help="report.json files.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The page to write; default: stdout.")
    ] = None,
) -> None:
    """Make the support matrix, a Markdown page, from reports alone."""
    _require_extra()
    from quire.conformance.matrix import render_matrix
    from quire.conformance.records import checksum_of
    from quire.conformance.reporting import read_report

    reports = [read_report(path) for path in paths]
    for path, result in zip(paths, reports, strict=True):
        if result.checksum != checksum_of(result):
            raise ConfigError(f"{path} was edited after its run: its checksum does not fit")
    page = render_matrix(reports)
    if output is None:
        typer.echo(page, nl=False)
        return
    output.write_text(page, encoding="utf-8")
    typer.echo(f"wrote {output} from {len(reports)} reports")


@conformance.command(name="list")
def list_tests(
    level: Annotated[int, typer.Option(help="The highest level to list.")] = 3,
    extensions: Annotated[
        str, typer.Option(help="Extensions to list as well: all, none or NAME,...")
    ] = "none",
) -> None:
    """List the ids of the tests: the manifest."""
    _require_extra()
    from quire.conformance.extensions import chosen_extensions
    from quire.conformance.verdicts import manifest_with

    for name in manifest_with(level, chosen_extensions(extensions, level)):
        typer.echo(name)


@conformance.command()
def badge(
    backend: Annotated[str, typer.Option(help="The backend, as in `quire backends`.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with the counts.")] = False,
) -> None:
    """Check that a backend uses the public interface alone and patches nothing. Runs none of it."""
    import msgspec

    from quire.conformance.badge import make_badge

    made = make_badge(backend)
    if as_json:
        write_json(msgspec.to_builtins(made))
    elif made.is_granted:
        typer.echo(f"{backend}: zero-patch badge granted ({made.distribution})")
    else:
        typer.echo(f"{backend}: zero-patch badge not granted", err=True)
        for finding in made.findings:
            typer.echo(f"  {finding}", err=True)
    if not made.is_granted:
        raise typer.Exit(1)


def _show(result: Report) -> None:
    counts = ", ".join(f"{count} {name}" for name, count in result.counts.items())
    typer.echo(f"{result.headline} ({counts}; seed {result.seed})")
    for verdict in result.extensions:
        if verdict.claim:
            typer.echo(f"  extension {verdict.name}: {verdict.text} ({verdict.claim})")
    for problem in [*result.problems, *(f"{name}: missing" for name in result.missing)]:
        typer.echo(f"  {problem}", err=True)
