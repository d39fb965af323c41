"""Command-line options made of the fields of a configuration, so that none is forgotten."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any

import typer

from quire.core.config import EngineConfig
from quire.core.env import read_environment
from quire.core.errors import ConfigError
from quire.core.sampling_params import SamplingParams
from quire.core.serving.settings import ServerSettings

Command = Callable[..., None]

_BYTE_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_SINGULAR = {"api_keys": "--api-key", "allowed_origins": "--allowed-origin"}
"""Options that may be repeated, each time with one value."""
_SAMPLING_FIELDS = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "stop_token_ids"),
    *("ignore_eos", "min_tokens", "bad_words", "allowed_token_ids", "skip_special_tokens"),
    *("truncate_prompt_tokens", "priority", "cache_salt"),
)


def with_engine_options(command: Command) -> Command:
    """Gives `command(..., config=...)` an argument MODEL and an option for each engine setting."""
    model = inspect.Parameter(
        "model",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        annotation=Annotated[
            str, typer.Argument(help="A local directory, a hub id, or `demo`.", show_default=False)
        ],
    )
    return _extended(command, [model, *_options(EngineConfig, "Engine")], "config", make_config)


def with_engine_options_for(model: str) -> Callable[[Command], Command]:
    """As `with_engine_options`, for a command that has its own model."""

    def decorate(command: Command) -> Command:
        def make(given: dict[str, Any]) -> EngineConfig:
            return make_config({"model": model, **given})

        return _extended(command, _options(EngineConfig, "Engine"), "config", make)

    return decorate


def with_optional_engine_options(command: Command) -> Command:
    """Gives `command(..., config=...)` an option for each engine setting, and `--model`.

    The configuration is None where no model is given. Raises: ConfigError for settings without one.
    """
    model = inspect.Parameter(
        "model",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            str | None, typer.Option(help="A local directory, a hub id, or `demo`.")
        ],
    )

    def make(given: dict[str, Any]) -> EngineConfig | None:
        if given.get("model") is not None:
            return make_config(given)
        if useless := sorted(_given(given)):
            raise ConfigError(f"--{useless[0].replace('_', '-')} is of no use without --model")
        return None

    return _extended(command, [model, *_options(EngineConfig, "Engine")], "config", make)


def with_sampling_options(command: Command) -> Command:
    """Gives `command(..., sampling=...)`, a dict of what was given, the options of sampling."""
    options = _options(SamplingParams, "Sampling", only=_SAMPLING_FIELDS)
    return _extended(command, options, "sampling", _given)


def with_server_options(command: Command) -> Command:
    """Gives `command(..., settings=...)`, a dict of what was given, the server's options."""
    names = tuple(f.name for f in fields(ServerSettings) if f.name != "keys")
    options = _options(ServerSettings, "Server", only=names)
    return _extended(command, options, "settings", _given)


def make_config(given: Mapping[str, Any]) -> EngineConfig:
    """The configuration that the options say; without `--device`, QUIRE_DEVICE counts.

    Raises: ConfigError.
    """
    settings = _given(given)
    device = read_environment().device
    if device is not None:
        settings.setdefault("device", device)
    for name in ("options", "logits_processors"):
        if name in settings:
            settings[name] = _pairs(name, settings[name])
    if "limit_mm_per_prompt" in settings:
        limits = _pairs("limit_mm_per_prompt", settings["limit_mm_per_prompt"])
        settings["limit_mm_per_prompt"] = {kind: _count(kind, n) for kind, n in limits.items()}
    if "allowed_media_domains" in settings:
        settings["allowed_media_domains"] = tuple(settings["allowed_media_domains"])
    return EngineConfig.from_user(**settings)


def _count(kind: str, text: str) -> int:
    """Raises: ConfigError for what is no number from 0 on."""
    if text.isdecimal():
        return int(text)
    raise ConfigError(f"--limit-mm-per-prompt {kind}={text}: give a number, as in {kind}=4")


def parse_bytes(text: str) -> int:
    """`512M`, `4G` or plain bytes; K, M, G and T are powers of 1024. Raises: typer.BadParameter."""
    number = text.strip().lower().removesuffix("ib").removesuffix("b")
    unit = number[-1:] if number[-1:] in _BYTE_UNITS else ""
    try:
        return int(float(number.removesuffix(unit)) * (1 << _BYTE_UNITS[unit]))
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(f"{text!r} is not a size; write 512M or 4G") from error


def _extended(
    command: Command,
    extra: Sequence[inspect.Parameter],
    target: str,
    make: Callable[[dict[str, Any]], Any],
) -> Command:
    """`command` with `extra` parameters instead of `target`, which is made of their values."""
    own = inspect.signature(command, eval_str=True)
    names = [parameter.name for parameter in extra]

    @functools.wraps(command)
    def extended(**given: Any) -> None:
        made = make({name: given.pop(name) for name in names})
        command(**given, **{target: made})

    kept = [p for p in own.parameters.values() if p.name != target]
    positional = [p for p in extra if p.default is inspect.Parameter.empty]
    options = [p for p in extra if p.default is not inspect.Parameter.empty]
    # Keyword-only throughout: the order is that of the help page, defaults or not.
    ordered = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*positional, *kept, *options)
    ]
    extended.__annotations__ = {p.name: p.annotation for p in ordered}
    vars(extended)["__signature__"] = own.replace(parameters=ordered)
    # Else the signature of the inner one counts.
    del vars(extended)["__wrapped__"]
    return extended


@functools.cache
def _options(
    settings: type, panel: str, only: tuple[str, ...] | None = None
) -> tuple[inspect.Parameter, ...]:
    chosen = [f for f in fields(settings) if f.name != "model" and (only is None or f.name in only)]
    # Only of these: other fields may name types that exist for type checkers alone.
    annotated = types.SimpleNamespace(__annotations__={f.name: f.type for f in chosen})
    hints = typing.get_type_hints(annotated, vars(sys.modules[settings.__module__]))
    helps = field_docs(settings)
    return tuple(_option(f, hints[f.name], helps.get(f.name, ""), panel) for f in chosen)


def _option(field: Field[Any], hint: Any, text: str, panel: str) -> inspect.Parameter:
    """An option that is None unless given: what was not asked keeps the configuration's default."""
    default = None if field.default is MISSING else field.default
    shown = f" (default: {default})" if default not in (None, "", ()) else ""
    # For whom types, None is what happens without the option.
    text = text.replace("None: ", "Default: ")
    parser = parse_bytes if field.name.endswith("_bytes") else None
    info = typer.Option(
        *([_SINGULAR[field.name]] if field.name in _SINGULAR else []),
        help=f"{text}{shown}".strip() or None,
        rich_help_panel=panel,
        show_default=False,
        parser=parser,
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[_cli_type(hint) | None, info],
    )


def _cli_type(hint: Any) -> Any:
    """The type that the command line reads: lists for what may come several times."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return _cli_type(parts[-1])
    origin = typing.get_origin(hint)
    if origin is not None and issubclass(origin, Mapping):
        return list[str]
    if origin is not None and issubclass(origin, Sequence):
        return list[typing.get_args(hint)[0]]  # type: ignore[misc]
    return hint


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None and value != []}


def _pairs(name: str, texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} {text!r} must be NAME=VALUE")
        pairs[key] = value
    return pairs


def field_docs(settings: type) -> dict[str, str]:
    """Field name to the docstring under it."""
    try:
        tree = ast.parse(inspect.getsource(settings))
    except OSError:  # installed without sources: the options are there, their help is not
        return {}
    [body] = [node.body for node in tree.body if isinstance(node, ast.ClassDef)]
    docs = {}
    for node, after in itertools.pairwise(body):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and is_text:
            docs[node.target.id] = inspect.cleandoc(str(after.value.value))  # type: ignore[attr-defined]
    return docs
