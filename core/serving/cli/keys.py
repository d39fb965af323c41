"""`quire key`: makes an API key and the lines that a file of keys needs for it."""

from __future__ import annotations

import secrets
from typing import Annotated

import typer

from quire.core.serving.operations.api_keys import ApiKey, sha256_of


def key(
    name: Annotated[str, typer.Argument(help="Whose it is, for logs and limits.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="inference, metrics or admin; may be repeated.")
    ] = None,
) -> None:
    """Make an API key. It is shown once, on stderr; the file gets its hash, on stdout."""
    secret = f"quire-{secrets.token_urlsafe(32)}"
    scopes = tuple(scope or ("inference", "metrics"))
    made = ApiKey(name=name, sha256=sha256_of(secret), scopes=scopes)
    typer.echo(f"the key, which is not kept anywhere: {secret}", err=True)
    listed = ", ".join(f'"{one}"' for one in made.scopes)
    typer.echo(f'[[key]]\nname = "{made.name}"\nsha256 = "{made.sha256}"\nscopes = [{listed}]')
