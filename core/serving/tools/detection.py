"""Which formats a server's model speaks."""

from __future__ import annotations

from typing import Any, Protocol

from quire.core.config import EngineConfig
from quire.core.engine.chat import read_template
from quire.core.serving.settings import ServerSettings
from quire.core.serving.tools.registry import Formats, choose_formats


class TemplatedEngine(Protocol):
    """What is asked of an engine."""

    config: EngineConfig
    tokenizer: Any


def formats_of(engine: TemplatedEngine, settings: ServerSettings) -> Formats:
    """The formats that the settings name, or that the chat template speaks for sure.

    Raises: ConfigError for an unknown name.
    """
    return choose_formats(
        settings.tool_call_parser,
        settings.reasoning_parser,
        _template(engine),
        _special_tokens(engine.tokenizer),
    )


def _template(engine: TemplatedEngine) -> str:
    if engine.config.chat_template is not None:
        return read_template(engine.config.chat_template)
    found = getattr(engine.tokenizer, "chat_template", None)
    if isinstance(found, dict):  # templates by name: the one for tools, if there is one
        found = found.get("tool_use") or found.get("default")
    return found if isinstance(found, str) else ""


def _special_tokens(tokenizer: Any) -> frozenset[str]:
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if not isinstance(added, dict):
        return frozenset()
    return frozenset(str(token.content) for token in added.values() if token.special)
