"""Who may ask for what: API keys, their scopes, and how a file names them."""

from __future__ import annotations

import hashlib
import hmac
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from quire.core.errors import ConfigError

SCOPES = ("inference", "metrics", "admin")
"""`admin` may do everything; `metrics` reads numbers; `inference` asks the model."""
_HASH_LENGTH = 64
_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrency")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One key. What is kept of it is its SHA-256, so that neither memory dumps nor logs show it."""

    name: str
    """For logs and limits."""
    sha256: str
    """Hexadecimal. A key made by `quire key` is random, so a plain hash is enough."""
    scopes: tuple[str, ...] = ("inference", "metrics")
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    """Prompt and output tokens together."""
    max_concurrency: int | None = None
    """The most requests of this key that are answered at once."""

    def __post_init__(self) -> None:
        problems = [f"unknown scope {s!r}" for s in self.scopes if s not in SCOPES]
        if not self.scopes:
            problems.append("no scope")
        if len(self.sha256) != _HASH_LENGTH or not set(self.sha256) <= set("0123456789abcdef"):
            problems.append("sha256 is not 64 hexadecimal digits")
        problems += [
            f"{name} is {value}; it must be above 0"
            for name in _LIMITS
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        if problems:
            raise ConfigError(f"API key {self.name!r}: {'; '.join(problems)}")

    def allows(self, scope: str) -> bool:
        """Whether this key may do what needs `scope`."""
        return scope in self.scopes or "admin" in self.scopes


class KeyRing:
    """All keys of a server."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple(keys)
        names = [key.name for key in self._keys]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"two API keys have the name {', '.join(twice)}; names must differ")

    def find(self, secret: str) -> ApiKey | None:
        """The key whose secret this is.

        All hashes are compared, each in constant time, so that the answer's time tells nothing.
        """
        given = sha256_of(secret)
        matches = [key for key in self._keys if hmac.compare_digest(given, key.sha256)]
        return matches[0] if matches else None


def sha256_of(secret: str) -> str:
    """The hash under which a key is kept."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def plain_key(secret: str, index: int) -> ApiKey:
    """A key given by flag or environment: everything but administration."""
    return ApiKey(name=f"key-{index}", sha256=sha256_of(secret), scopes=SCOPES)


def read_keys(path: Path) -> list[ApiKey]:
    """The keys of a TOML file, each a table `[[key]]` with `name` and `sha256` or `key`.

    Raises: ConfigError naming the file and what is wrong in it.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the API keys in {path} cannot be read: {error}") from error
    rows = tables.get("key")
    if set(tables) != {"key"} or not isinstance(rows, list) or not rows:
        raise ConfigError(f"{path} must hold tables [[key]] and nothing else")
    try:
        return [_key_of(row) for row in rows]
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _key_of(row: Any) -> ApiKey:
    given = dict(row)
    secret = given.pop("key", None)
    if (secret is None) == ("sha256" not in given) or secret == "":
        raise ConfigError(f"API key {given.get('name')!r} needs either `key` or `sha256`")
    if secret is not None:
        given["sha256"] = sha256_of(str(secret))
    known = {f.name for f in fields(ApiKey)}
    unknown = sorted(set(given) - known)
    if unknown or "name" not in given:
        problem = f"unknown setting {', '.join(unknown)}" if unknown else "a key without a name"
        raise ConfigError(f"{problem}; known are key, {', '.join(sorted(known))}")
    given["scopes"] = tuple(given.get("scopes", ("inference", "metrics")))
    return ApiKey(**given)
