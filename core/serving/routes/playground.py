"""`GET /`: the page on which people try the model, and its files."""

from __future__ import annotations

import functools
from pathlib import Path

from fastapi import APIRouter, Response

from quire.core.serving.http.error_responses import Failure

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).parents[1] / "playground"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # Nothing but our own files, nothing inline, nobody may frame it: what a model says stays text.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def get_page() -> Response:
    """The page."""
    return await get_file("index.html")


@router.get("/playground/{name}")
async def get_file(name: str) -> Response:
    """One of its files; only names that the folder has are ever looked up."""
    if name not in _names():
        message = f"the playground has no file {name!r}"
        return Failure(
            status=404, message=message, type="not_found_error", code="not_found"
        ).response()
    path = _FOLDER / name
    return Response(path.read_bytes(), media_type=_TYPES[path.suffix], headers=_HEADERS)


@functools.cache
def _names() -> frozenset[str]:
    return frozenset(path.name for path in _FOLDER.iterdir() if path.suffix in _TYPES)
