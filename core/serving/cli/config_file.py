"""Settings from a file and from the environment: flags > environment > file > defaults."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import typer

from quire.core.config import EngineConfig
from quire.core.env import read_settings
from quire.core.errors import ConfigError
from quire.core.serving.settings import ServerSettings

_SOURCES = "quire.setting_sources"
_SECRETS = frozenset({"api_keys", "hf_token"})
_NOT_SETTINGS = frozenset({"config_file", "show_config", "help"})


def use_settings(ctx: typer.Context, path: Path | None) -> Path | None:
    """The callback of `--config`: what file and environment say becomes the options' defaults.

    Raises: ConfigError for a file that cannot be read, and for names that no option has.
    """
    names = {option.name for option in ctx.command.params if option.name} - _NOT_SETTINGS
    found: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if path is not None:
        from_file = _known(read_config_file(path), names, ctx, path)
        found |= from_file
        sources |= dict.fromkeys(from_file, f"file {path}")
    for name, value in read_settings(sorted(names)).items():
        option = next(one for one in ctx.command.params if one.name == name)
        found[name] = value.split(",") if getattr(option, "multiple", False) else value
        sources[name] = f"environment QUIRE_{name.upper()}"
    ctx.default_map = {**(ctx.default_map or {}), **found}
    ctx.meta[_SOURCES] = sources
    return path


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings of a TOML or YAML file, as text that options can parse.

    Raises: ConfigError naming the file and what is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else _parse_yaml(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold settings, each as `name: value`")
    return {str(name).replace("-", "_"): _as_text(value) for name, value in data.items()}


def describe_settings(ctx: typer.Context) -> list[tuple[str, str, str]]:
    """Every setting: its name, its value, and where that came from. Secrets are not shown."""
    defaults = {
        f.name: "" if f.default is MISSING else f.default
        for settings in (EngineConfig, ServerSettings)
        for f in fields(settings)
    }
    rows = []
    for option in ctx.command.params:
        name = option.name or ""
        if name in _NOT_SETTINGS:
            continue
        value = ctx.params.get(name)
        is_given = value is not None and value not in ([], ())
        shown = value if is_given else defaults.get(name)
        hidden = name in _SECRETS and is_given
        rows.append((name, "(hidden)" if hidden else _shown(shown), _source(ctx, name)))
    return rows


def _source(ctx: typer.Context, name: str) -> str:
    # By name: typer may bring a copy of click of its own.
    source = getattr(ctx.get_parameter_source(name), "name", "DEFAULT")
    if source == "COMMANDLINE":
        return "flag"
    if source == "DEFAULT_MAP":
        return str(ctx.meta[_SOURCES].get(name, "file"))
    return "default"


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return ", ".join(str(one) for one in value) or "-"
    return str(value) or "-"


def _known(
    given: Mapping[str, Any], names: set[str], ctx: typer.Context, path: Path
) -> dict[str, Any]:
    """By the options' own names; a file may write them as the command line does."""
    spelled = {
        flag.lstrip("-").replace("-", "_"): option.name or ""
        for option in ctx.command.params
        if option.name in names
        for flag in (*option.opts, option.name or "")
    }
    unknown = sorted(name for name in given if spelled.get(name) not in names)
    if unknown:
        known = ", ".join(sorted(names))
        raise ConfigError(f"{path} has unknown settings {', '.join(unknown)}; known are {known}")
    return {spelled[name]: value for name, value in given.items()}


def _parse_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(
            "a YAML configuration needs PyYAML, which is not installed; write TOML, or "
            'run: pip install "quire[serve]"'
        ) from error
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _as_text(value: Any) -> Any:
    """As it would stand on the command line: lists stay lists, mappings become NAME=VALUE."""
    if isinstance(value, Mapping):
        return [f"{name}={one}" for name, one in value.items()]
    if isinstance(value, list):
        return [str(one) for one in value]
    if isinstance(value, bool):
        return value
    return None if value is None else str(value)
