"""Tools and their calls, as the OpenAI API writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from quire.core.errors import RequestError
from quire.core.serving.protocol.base import RequestBody, ResponseBody
from quire.core.serving.tools.events import read_json


class FunctionSchema(RequestBody):
    """What a tool is called, does and takes."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Without effect on a call of the model's own accord; required and named ones always fit."""


class FunctionTool(RequestBody):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionSchema

    def to_template(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": function}


class NamedFunction(RequestBody):
    """The name of a tool."""

    name: str


class NamedToolChoice(RequestBody):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


class CalledFunction(RequestBody):
    """Which tool an earlier turn called, and with what."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class MessageToolCall(RequestBody):
    """A call in an earlier turn of the assistant."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def to_template(self) -> dict[str, Any]:
        """As chat templates take it: arguments are an object, where they are one."""
        given = self.function.arguments
        arguments = read_json(given) if isinstance(given, str) else given
        if not isinstance(arguments, Mapping):
            arguments = given
        call = {
            "type": "function",
            "function": {"name": self.function.name, "arguments": arguments},
        }
        return call if self.id is None else {"id": self.id, **call}


class CallFunction(ResponseBody):
    """The tool that is called, or what was added to its arguments."""

    name: str | None = None
    arguments: str = ""


class CallBody(ResponseBody):
    """A tool call of an answer, or in a stream what was added to it."""

    index: int | None = None
    """In streams alone."""
    id: str | None = None
    type: Literal["function"] | None = None
    function: CallFunction


def check_tools(tools: list[FunctionTool], choice: ToolChoice | None) -> None:
    """Raises: RequestError for names that repeat, and for a choice that there is not."""
    names = [tool.function.name for tool in tools]
    if len(set(names)) != len(names):
        raise RequestError("two tools have the same name; give each its own", param="tools")
    if choice is None or choice in ("none", "auto"):
        return
    if not tools:
        raise RequestError(
            "tool_choice asks for a call and there are no tools; give some", param="tool_choice"
        )
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        raise RequestError(
            f"tool_choice names {choice.function.name[:60]!r}; the tools are {', '.join(names)}",
            param="tool_choice",
        )
