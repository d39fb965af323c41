"""Lets in who has a key for what is asked, within the key's limits."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from quire.core.serving.http.error_responses import Failure, HttpError
from quire.core.serving.http.error_styles import response_to
from quire.core.serving.operations.api_keys import ApiKey, KeyRing
from quire.core.serving.operations.key_limits import KeyLimits
from quire.core.serving.operations.record import path_of, record_of

OPEN_PATHS = frozenset({"/health", "/ready", "/live", "/ping", "/version", "/"})
"""What may be asked without a key: it tells nothing of anybody's requests."""
OPEN_PREFIX = "/playground/"
"""The files of the page at `/`, the same for everybody."""
METRICS_PATHS = frozenset({"/metrics", "/load"})
ADMIN_PATHS = (
    *("/admin", "/sleep", "/wake_up", "/is_sleeping", "/reset_prefix_cache"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/start_profile", "/stop_profile"),
)
"""And everything under them: what changes the server for all."""


class AccessMiddleware:
    """Asks for a key wherever one is needed, and holds the key to its scopes and limits."""

    def __init__(
        self, app: ASGIApp, *, ring: KeyRing, limits: KeyLimits, protects_metrics: bool
    ) -> None:
        self._app = app
        self._ring = ring
        self._limits = limits
        self._protects_metrics = protects_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        # Browsers ask without a key whether they may send one.
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        try:
            key = self._identify(scope)
        except HttpError as error:
            await response_to(scope, error.failure)(scope, receive, send)
            return
        await self._admit(key, scope, receive, send)

    async def _admit(self, key: ApiKey, scope: Scope, receive: Receive, send: Send) -> None:
        record = record_of(scope)
        if record is not None:
            record.key_name = key.name
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            with self._limits.admitted(key):
                await self._app(scope, receive, send)
        except HttpError as error:
            await response_to(scope, error.failure)(scope, receive, send)
        finally:
            if record is not None:
                used = record.num_prompt_tokens + record.num_output_tokens
                self._limits.spend_tokens(key, used)

    def _identify(self, scope: Scope) -> ApiKey:
        key = self._ring.find(secret_of(Headers(scope=scope)))
        if key is None:
            raise HttpError(
                Failure(
                    status=401,
                    message="the API key is missing or wrong; send `Authorization: Bearer KEY`",
                    type="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            )
        needed = scope_needed(path_of(scope))
        if not any(key.allows(one) for one in needed):
            raise HttpError(
                Failure(
                    status=403,
                    message=f"the API key {key.name!r} lacks the scope {' or '.join(needed)}",
                    type="permission_error",
                    code="insufficient_scope",
                )
            )
        return key

    def _is_open(self, scope: Scope) -> bool:
        path = path_of(scope)
        if path in METRICS_PATHS and not self._protects_metrics:
            return True
        # POST / asks the model, as /generate does.
        is_page = path in OPEN_PATHS or path.startswith(OPEN_PREFIX)
        return is_page and scope["method"] in {"GET", "HEAD"}


def secret_of(headers: Headers) -> str:
    """The key that a client sent, as `Authorization: Bearer` or in Anthropic's `x-api-key`."""
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return secret.strip()
    return headers.get("x-api-key", "").strip()


def scope_needed(path: str) -> tuple[str, ...]:
    """One of these scopes opens the path."""
    if path in METRICS_PATHS:
        return ("metrics",)
    if path == "/v1/server":
        return ("metrics", "inference")
    if any(path == admin or path.startswith(admin + "/") for admin in ADMIN_PATHS):
        return ("admin",)
    return ("inference",)
