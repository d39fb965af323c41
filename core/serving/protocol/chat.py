"""`/v1/chat/completions`: its request, response and chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from quire.core.engine.chat_images import image_of, is_image_part
from quire.core.engine.chat_sounds import is_sound_part
from quire.core.errors import RequestError
from quire.core.sampling_params import SamplingParams
from quire.core.serving.protocol.base import Count, RequestBody, ResponseBody
from quire.core.serving.protocol.completions import PromptLogprobs
from quire.core.serving.protocol.sampling import SamplingFields
from quire.core.serving.protocol.tools import (
    CallBody,
    FunctionTool,
    MessageToolCall,
    ToolChoice,
    check_tools,
)
from quire.core.serving.protocol.usage import Usage


class TextPart(RequestBody):
    """A piece of a message. Images and sound stand beside it; files are refused by their type."""

    type: str
    text: str


class ChatMessage(RequestBody):
    """One turn of the conversation, with the empty fields that clients send back from an answer."""

    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "refusal": (),
        "annotations": ([],),
        "audio": (),
        "function_call": (),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    """None only where an assistant's turn is calls alone."""
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    """What an assistant's turn called."""
    tool_call_id: str | None = None
    """Which call a tool's turn answers."""
    reasoning: str | None = None
    reasoning_content: str | None = None
    """What an assistant's turn thought; both names are known."""

    @property
    def text(self) -> str:
        """The content as one string; several parts stand on lines of their own.

        Raises: RequestError for a part that is not text.
        """
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(_text_of(part) for part in self.content)

    @property
    def images(self) -> list[Any]:
        """The addresses of the images that the message shows.

        Raises: RequestError for an image part without one.
        """
        parts = self.content if isinstance(self.content, list) else ()
        return [image_of(part) for part in parts if is_image_part(part)]

    @property
    def sounds(self) -> list[dict[str, Any]]:
        """The parts of the message that are sound."""
        parts = self.content if isinstance(self.content, list) else ()
        return [part for part in parts if is_sound_part(part)]

    def _parts(self) -> list[dict[str, Any]]:
        """Text, images and sound in their order, as templates that know them take them."""
        assert isinstance(self.content, list), self.content
        return [_shown(part) for part in self.content]

    def to_template(self) -> dict[str, Any]:
        """The message as chat templates take it; `developer` means `system`, which they know.

        Raises: RequestError for fields that the role has not.
        """
        self._check()
        role = "system" if self.role == "developer" else self.role
        content = self._parts() if self.images or self.sounds else self.text
        message: dict[str, Any] = {"role": role, "content": content}
        thoughts = self.reasoning_content or self.reasoning
        optional = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "tool_calls": [call.to_template() for call in self.tool_calls or ()] or None,
            "reasoning_content": thoughts or None,
        }
        return message | {key: value for key, value in optional.items() if value is not None}

    def _check(self) -> None:
        is_assistant = self.role == "assistant"
        if self.content is None and not (is_assistant and self.tool_calls):
            raise RequestError(f"a message of role {self.role} needs content", param="messages")
        if self.tool_calls and not is_assistant:
            raise RequestError("tool_calls are an assistant's", param="messages")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise RequestError(
                "a message of role tool, and no other, has tool_call_id", param="messages"
            )


class TemplateFields(RequestBody):
    """How a conversation becomes a prompt."""

    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[FunctionTool] | None = None
    tool_choice: ToolChoice | None = None
    """None: `auto` where there are tools."""
    reasoning_effort: str | None = Field(default=None, max_length=32)
    """For templates that know it."""
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    """None: yes, unless the last message is to be continued."""
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    """None: no, since templates write them."""

    @property
    def images(self) -> list[Any]:
        """The addresses of all images of the conversation, in their order.

        Raises: RequestError for an image part without one.
        """
        return [image for message in self.messages for image in message.images]

    @property
    def sounds(self) -> list[dict[str, Any]]:
        """The parts of all messages that are sound, in their order."""
        return [sound for message in self.messages for sound in message.sounds]

    @property
    def adds_generation_prompt(self) -> bool:
        """Whether the prompt ends with the opening of the assistant's turn."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt

    @property
    def shown_tools(self) -> list[FunctionTool]:
        """The tools that the prompt tells of: all, or none where none may be called."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the template is told besides the conversation."""
        effort = self.reasoning_effort
        own = {} if effort in (None, "none") else {"reasoning_effort": effort}
        return {**own, **(self.chat_template_kwargs or {})}

    def check_template_fields(self) -> None:
        """Raises: RequestError for fields that contradict each other."""
        check_tools(self.tools or [], self.tool_choice)
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "add_generation_prompt and continue_final_message exclude each other; set one",
                param="continue_final_message",
            )


class ChatRequest(SamplingFields, TemplateFields):
    """A conversation to continue."""

    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "verbosity": (),
        "web_search_options": (),
        "moderation": (),
        "prompt_cache_options": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "use_beam_search": (False,),
        "length_penalty": (1.0, 1),
        "echo": (False,),
        "documents": ([],),
        "mm_processor_kwargs": (),
        "kv_transfer_params": (),
        "best_of": (1,),
        "suffix": ("",),
    }
    ignored_fields: ClassVar[frozenset[str]] = frozenset(
        {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    )

    model: str | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    parallel_tool_calls: bool | None = None
    """None or true: as many calls as the model makes; false: one."""
    thinking_token_budget: Count | None = Field(default=None, ge=1)
    """Thoughts that become longer are ended."""
    include_reasoning: bool | None = None
    """False: thoughts are left out of the answer."""

    def to_sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """What the engine is asked for; `defaults` are those of the model.

        Raises: RequestError naming the field.
        """
        self.check_template_fields()
        settings = self.sampling_settings(defaults)
        asked = self._max_tokens()
        settings["max_tokens"] = defaults.get("max_tokens") if asked is None else asked
        if self.top_logprobs and not self.logprobs:
            raise RequestError(
                "top_logprobs is given without logprobs=true; set it or leave top_logprobs out",
                param="top_logprobs",
            )
        settings["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        return SamplingParams(**settings)

    def _max_tokens(self) -> int | None:
        if self.max_completion_tokens is None:
            return self.max_tokens
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise RequestError(
                f"max_tokens is {self.max_tokens} and max_completion_tokens "
                f"{self.max_completion_tokens}; give one of them",
                param="max_completion_tokens",
            )
        return self.max_completion_tokens


class ChatTopLogprob(ResponseBody):
    """A token that could have stood at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    """The token that stands at a position, and the most likely ones."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(ResponseBody):
    """Log-probabilities of a message's tokens."""

    content: list[ChatTokenLogprob]
    refusal: None


class AnswerMessage(ResponseBody):
    """The assistant's turn, or in a stream what was added to it."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    """What the model thought, where the server reads thoughts out of the answer."""
    reasoning: str | None = None
    """The same, by its newer name."""
    tool_calls: list[CallBody] | None = None


class ChatChoice(ResponseBody):
    """One whole answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatChunkChoice(ResponseBody):
    """What was added to one answer."""

    index: int
    delta: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatResponse(ResponseBody):
    """All answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class ChatChunk(ResponseBody):
    """One event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


def _shown(part: dict[str, Any]) -> dict[str, Any]:
    """A part as templates take it: what is no text stands for itself."""
    if is_image_part(part):
        return {"type": "image"}
    return {"type": "audio"} if is_sound_part(part) else {"type": "text", "text": _text_of(part)}


def _text_of(part: dict[str, Any]) -> str:
    kind = part.get("type")
    if kind != "text":
        raise RequestError(
            f"a content part of type {str(kind)[:40]!r} is not supported; "
            "this server takes text, images and sound",
            param="messages",
        )
    return TextPart.model_validate(part).text
