"""What one HTTP request came to: filled while it is answered, read by logs, traces and limits."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from starlette.types import Scope

from quire.core.outputs import RequestMetrics


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """Made by the outermost middleware, held in the request's scope; grows until the last byte."""

    request_id: str
    key_name: str | None = None
    """Of the API key that was sent; None where none is asked for."""
    arrival_s: float = field(default_factory=time.monotonic)
    status: int = 0
    """Of the response; 0 until it began."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    first_token_s: float | None = None
    """On the clock of `time.monotonic`."""
    finish_reasons: Counter[str] = field(default_factory=Counter)
    timings: list[RequestMetrics] = field(default_factory=list)
    """The engine's own times, one for each prompt that has ended."""

    @property
    def time_to_first_token_s(self) -> float | None:
        """From arrival; None if no token came."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s


def record_of(scope: Scope) -> RequestRecord | None:
    """The record of a request; None where no middleware made one."""
    found = scope.get("state", {}).get("record")
    return found if isinstance(found, RequestRecord) else None


def path_of(scope: Scope) -> str:
    """The path as the routes know it: without the root path, if the proxy has left that on."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    if root and (path == root or path.startswith(root + "/")):
        return path[len(root) :] or "/"
    return path
