"""`quire doctor`: what is installed, what does not fit together, and what to do."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from quire.core.serving.cli.console import out, table, write_json


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say what is installed, what mismatches and what to do. Ends with 1 if something is wrong."""
    from quire.core.doctor import WARNING, diagnose, is_healthy

    findings = diagnose()
    healthy = is_healthy(findings)
    if as_json:
        write_json({"is_healthy": healthy, "findings": [asdict(finding) for finding in findings]})
    else:
        rows = [(f.status, f.subject, f.found, f.remedy) for f in findings]
        out().print(table("Diagnosis", ("", "what", "found", "what to do"), rows))
        warned = any(finding.status == WARNING for finding in findings)
        fine = "Nothing is wrong; see the warnings above." if warned else "Nothing is wrong."
        typer.echo(fine if healthy else "Something is wrong: see above.")
    if not healthy:
        raise typer.Exit(1)
