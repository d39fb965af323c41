"""Which exit status an error has, and what is missing for a command."""

from __future__ import annotations

from importlib.util import find_spec

from quire.core.errors import ConfigError, QuireError, RequestError

USAGE = 2
FAILURE = 1


def status_of(error: QuireError) -> int:
    """2 for what the user asked wrongly, 1 for what failed."""
    return USAGE if isinstance(error, ConfigError | RequestError) else FAILURE


def require_extra(extra: str, *modules: str) -> None:
    """Raises: ConfigError with the command that installs `extra`, if a module is missing."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"this command needs {', '.join(missing)}, which is not installed; "
            f'run: pip install "quire[{extra}]"'
        )
