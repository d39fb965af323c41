"""Conversations to prompts, by the model's chat template or one that a request brings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quire.core.engine.template_process import TemplateFailedError, TemplateProcess
from quire.core.engine.tokenizer import TextCodec, tool_schema
from quire.core.errors import ConfigError, RequestError

Message = Mapping[str, Any]

TIME_LIMIT_S = 5.0
"""For one conversation. A template that loops is stopped here."""
MAX_CHARS = 8_000_000
"""Of one prompt; more than any context holds."""
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks where the last message ends; what the template writes behind it is cut."""


class ChatRenderer:
    """Renders conversations.

    Templates of requests run in a process of their own, so that one that loops delays no other.
    May be used from several threads.
    """

    def __init__(
        self,
        codec: TextCodec,
        chat_template: str | None = None,
        *,
        time_limit_s: float = TIME_LIMIT_S,
        max_chars: int = MAX_CHARS,
    ) -> None:
        """`chat_template`: a template, or a file that holds one; None: the tokenizer's.

        Raises: ConfigError for a file that cannot be read.
        """
        self._tokenizer = codec.tokenizer
        self._own_template = None if chat_template is None else read_template(chat_template)
        self._own = TemplateProcess(time_limit_s=time_limit_s, max_chars=max_chars)
        self._guest = TemplateProcess(time_limit_s=time_limit_s, max_chars=max_chars)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, special tokens included.

        Raises: RequestError for messages that are none, for a template that fails or
        exceeds a limit, and where there is no template.
        """
        conversation = _check_messages(messages)
        if continue_final_message:
            _check_continuation(conversation, add_generation_prompt)
            conversation[-1] = _with_tag(conversation[-1])
        schemas = None if tools is None else [_schema(tool) for tool in tools]
        variables = {
            **{name: str(token) for name, token in self._special_tokens().items()},
            **(template_variables or {}),
            "messages": conversation,
            "tools": schemas,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        template = chat_template or self._template(schemas)
        process = self._own if chat_template is None else self._guest
        text = self._render(process, template, variables)
        return _cut_at_tag(text) if continue_final_message else text

    def close(self) -> None:
        """Ends the processes."""
        self._own.close()
        self._guest.close()

    def _render(self, process: TemplateProcess, template: str, variables: dict[str, Any]) -> str:
        try:
            return process.render(template, json.loads(json.dumps(variables, default=_plain)))
        except TemplateFailedError as error:
            raise RequestError(
                f"the chat template could not be rendered: {error}; "
                "check the messages, or use another template",
                param="chat_template" if process is self._guest else "messages",
            ) from error
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the messages are not JSON: {error}", param="messages") from error

    def _template(self, tools: list[Any] | None) -> str:
        if self._own_template is not None:
            return self._own_template
        try:
            return str(self._tokenizer.get_chat_template(tools=tools))
        except ValueError as error:
            raise RequestError(
                "the model has no chat template; "
                "give one with the setting chat_template, or send a prompt",
                param="messages",
            ) from error

    def _special_tokens(self) -> dict[str, Any]:
        special: dict[str, Any] = self._tokenizer.special_tokens_map
        return {name: token for name, token in special.items() if not isinstance(token, list)}


def read_template(chat_template: str) -> str:
    """A template as given, or the content of the file that is named.

    Raises: ConfigError for what is neither.
    """
    if any(mark in chat_template for mark in ("{%", "{{", "\n")):
        return chat_template
    path = Path(chat_template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"chat_template {chat_template!r} is neither a Jinja template nor a file "
            f"that can be read: {error}"
        ) from error


def split_conversations(messages: object) -> tuple[list[Sequence[Message]], bool]:
    """One conversation or a list of them, as a list, and whether it was a list."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(
            "messages must be a list of messages with role and content", param="messages"
        )
    if isinstance(messages[0], Mapping):
        return [messages], False
    return list(messages), True


def _check_messages(messages: object) -> list[dict[str, Any]]:
    """Copies without keys of None: clients send them, templates print them."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError("messages must be a list of at least one message", param="messages")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(
                f"a message is a dict with role and content, not {message!r}", param="messages"
            )
    return [{key: value for key, value in one.items() if value is not None} for one in messages]


def _check_continuation(messages: list[dict[str, Any]], add_generation_prompt: bool) -> None:
    if add_generation_prompt:
        raise RequestError(
            "continue_final_message goes on with the last message, "
            "add_generation_prompt begins a new one; ask for one of them",
            param="continue_final_message",
        )
    if not isinstance(messages[-1].get("content"), str):
        raise RequestError(
            "continue_final_message needs a last message whose content is a text",
            param="continue_final_message",
        )


def _with_tag(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": message["content"] + _TAG}


def _cut_at_tag(text: str) -> str:
    start = text.rfind(_TAG.strip())
    if start < 0:
        raise RequestError(
            "the chat template does not show the last message as it is, so it cannot be continued",
            param="continue_final_message",
        )
    is_whole = text[start : start + len(_TAG)] == _TAG
    return text[:start] if is_whole else text[:start].rstrip()


def _schema(tool: Mapping[str, Any] | Callable[..., Any]) -> Mapping[str, Any]:
    if isinstance(tool, Mapping):
        return tool
    if callable(tool):
        return tool_schema(tool)
    raise RequestError(f"a tool is a JSON schema or a function, not {tool!r}", param="tools")


def _plain(value: object) -> object:
    """What JSON does not know: records as dicts, anything else by the name of its type."""
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        return dump()
    if isinstance(value, Mapping):
        return dict(value)
    return f"<{type(value).__name__}>"
