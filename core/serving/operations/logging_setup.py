"""How log lines look, for people or for machines."""

from __future__ import annotations

import logging
import sys

from quire.core.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")


def set_up_logging(level: str, log_format: str) -> None:
    """Everything goes to stderr from now on. Raises: ConfigError for an unknown name."""
    for name, value, known in (("level", level, LEVELS), ("format", log_format, FORMATS)):
        if value not in known:
            raise ConfigError(f"log {name} {value!r} is unknown; choose one of {', '.join(known)}")
    # The same as the module of the server, which needs its libraries; only loaded for JSON.
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if log_format == "json":
        use_json()


def use_json() -> None:
    """Makes every handler write one JSON object a line, with the id of the request."""
    from quire.core.serving.operations.request_log import JsonFormatter, RequestIdFilter

    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter())
        handler.addFilter(RequestIdFilter())
