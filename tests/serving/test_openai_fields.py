"""Every field that the OpenAI and Anthropic clients can send is honoured or refused by name."""

from __future__ import annotations

import typing

import pytest
from anthropic import types as anthropic
from anthropic.types import message_count_tokens_params, message_create_params
from asking import connected
from fake_engine import FakeEngine, facts
from openai.types import chat as chat_types
from openai.types import completion_create_params, embedding_create_params, shared_params
from openai.types import responses as response_types
from openai.types.audio import transcription_create_params, translation_create_params
from openai.types.chat import chat_completion_stream_options_param
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params, response_text_config_param
from openai.types.shared_params import reasoning

from quire.core.serving.protocol import responses
from quire.core.serving.protocol.audio import TranscriptionForm, TranslationForm
from quire.core.serving.protocol.base import RequestBody
from quire.core.serving.protocol.chat import ChatMessage, ChatRequest, TextPart
from quire.core.serving.protocol.completions import CompletionRequest
from quire.core.serving.protocol.messages import MessagesFields, MessagesRequest
from quire.core.serving.protocol.pooling import EmbeddingRequest
from quire.core.serving.protocol.responses import ResponsesRequest
from quire.core.serving.protocol.sampling import StreamOptions
from quire.core.serving.protocol.structured import JsonSchemaFormat, ResponseFormat
from quire.core.serving.protocol.tools import (
    CalledFunction,
    FunctionSchema,
    FunctionTool,
    MessageToolCall,
)

TYPES: list[tuple[object, type[RequestBody]]] = [
    (chat.CompletionCreateParamsBase, ChatRequest),
    (chat.CompletionCreateParamsStreaming, ChatRequest),
    (chat_completion_stream_options_param.ChatCompletionStreamOptionsParam, StreamOptions),
    (completion_create_params.CompletionCreateParamsBase, CompletionRequest),
    (completion_create_params.CompletionCreateParamsStreaming, CompletionRequest),
    (embedding_create_params.EmbeddingCreateParams, EmbeddingRequest),
    (response_create_params.ResponseCreateParamsBase, ResponsesRequest),
    (response_create_params.ResponseCreateParamsStreaming, ResponsesRequest),
    (response_create_params.StreamOptions, responses.ResponseStreamOptions),
    (response_text_config_param.ResponseTextConfigParam, responses.TextOptions),
    (reasoning.Reasoning, responses.ReasoningOptions),
    (transcription_create_params.TranscriptionCreateParamsBase, TranscriptionForm),
    (transcription_create_params.TranscriptionCreateParamsStreaming, TranscriptionForm),
    (translation_create_params.TranslationCreateParams, TranslationForm),
    (message_create_params.MessageCreateParamsBase, MessagesRequest),
    (message_create_params.MessageCreateParamsStreaming, MessagesRequest),
    (message_count_tokens_params.MessageCountTokensParams, MessagesFields),
    (chat_types.ChatCompletionUserMessageParam, ChatMessage),
    (chat_types.ChatCompletionAssistantMessageParam, ChatMessage),
    (chat_types.ChatCompletionToolMessageParam, ChatMessage),
    (chat_types.ChatCompletionFunctionToolParam, FunctionTool),
    (shared_params.FunctionDefinition, FunctionSchema),
    (shared_params.ResponseFormatJSONSchema, ResponseFormat),
]
NOT_IN_THE_BODY = {"file"}
"""A form's file is no field of the model: the route takes it itself."""
NESTED: list[tuple[object, type[RequestBody]]] = [
    (chat_types.ChatCompletionContentPartTextParam, TextPart),
    (chat_types.ChatCompletionMessageFunctionToolCallParam, MessageToolCall),
    (chat_types.chat_completion_message_function_tool_call_param.Function, CalledFunction),
    (shared_params.response_format_json_schema.JSONSchema, JsonSchemaFormat),
]
"""Records that know no field as unsupported: what they do not have is refused as unknown."""
BLOCKS = {
    anthropic.TextBlockParam: {"type": "text", "text": "a"},
    anthropic.ToolUseBlockParam: {"type": "tool_use", "id": "c", "name": "f", "input": {}},
    anthropic.ToolResultBlockParam: {"type": "tool_result", "tool_use_id": "c", "content": "a"},
}
ITEMS = {
    response_types.ResponseFunctionToolCallParam: {
        "type": "function_call",
        "call_id": "c",
        "name": "f",
        "arguments": "{}",
    },
    response_types.response_input_item_param.FunctionCallOutput: {
        "type": "function_call_output",
        "call_id": "c",
        "output": "a",
    },
}
HONOURED = {"id", "status", "is_error", "cache_control"}
"""Optional fields of blocks and items that are read, or say nothing about the conversation."""
MAY_BE_IGNORED = {
    *("cache_control", "user_profile_id", "workspace_id"),
    *("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
}
"""What says something about the caller and changes nothing about the answer."""
BODIES = {
    "/v1/chat/completions": (ChatRequest, {"messages": [{"role": "user", "content": "a"}]}),
    "/v1/completions": (CompletionRequest, {"prompt": "a"}),
    "/v1/responses": (ResponsesRequest, {"input": "a"}),
    "/v1/embeddings": (EmbeddingRequest, {"input": "a"}),
}
MESSAGES = {"model": "fake", "max_tokens": 3}


@pytest.mark.parametrize(("params", "model"), TYPES, ids=lambda given: given.__name__)
def test_every_field_of_the_library_is_known(params, model):
    """A field that the library begins to send is noticed here, and decided about."""
    asked = set(typing.get_type_hints(params)) - NOT_IN_THE_BODY
    known = {*model.model_fields, *model.neutral_values, *model.ignored_fields}
    assert asked
    assert asked <= known, f"{model.__name__} says nothing of {sorted(asked - known)}"


@pytest.mark.parametrize("path", BODIES)
def test_what_is_ignored_says_nothing_about_the_answer(path):
    """Only what describes the caller may be dropped."""
    model, _ = BODIES[path]
    assert model.ignored_fields <= MAY_BE_IGNORED
    assert not model.ignored_fields & set(model.model_fields)


@pytest.mark.parametrize("path", BODIES)
async def test_every_field_that_is_not_served_is_refused_by_its_name(path):
    """Each field on the list of what is not served is refused with its own name when it asks."""
    model, body = BODIES[path]
    async with connected(FakeEngine(facts=facts(tasks=["generate", "embed"]))) as client:
        for name in model.neutral_values:
            response = await client.post(path, json={**body, name: {"odd": ["value"]}})
            assert response.status_code == 400, name
            assert response.json()["error"]["param"] == name
            neutral = await client.post(path, json={**body, name: None})
            assert neutral.status_code == 200, (name, neutral.text)


@pytest.mark.parametrize(("params", "model"), NESTED, ids=lambda given: given.__name__)
def test_field_that_a_record_does_not_have_is_an_error(params, model):
    """Within messages and tools, too, nothing is dropped: what is not read is refused."""
    known = {field.alias or name for name, field in model.model_fields.items()}
    for name in set(typing.get_type_hints(params)) - known:
        with pytest.raises(ValueError, match=name):
            model.model_validate({name: "odd"})


@pytest.mark.parametrize("params", BLOCKS, ids=lambda given: given.__name__)
async def test_field_of_an_anthropic_block_is_honoured_or_refused(params):
    """A block's field that the conversation could not show is no silence."""
    async with connected(FakeEngine()) as client:
        for name in sorted(set(typing.get_type_hints(params)) - set(BLOCKS[params]) - HONOURED):
            block = {**BLOCKS[params], name: {"odd": "value"}}
            role = "assistant" if block["type"] == "tool_use" else "user"
            turn = {"messages": [{"role": role, "content": [block]}]}
            response = await client.post("/v1/messages", json={**MESSAGES, **turn})
            assert response.status_code == 400, name
            assert name in response.json()["error"]["message"]


@pytest.mark.parametrize("params", ITEMS, ids=lambda given: given.__name__)
async def test_field_of_a_response_item_is_honoured_or_refused(params):
    """The same for the items of the Responses API."""
    async with connected(FakeEngine()) as client:
        for name in sorted(set(typing.get_type_hints(params)) - set(ITEMS[params]) - HONOURED):
            item = {**ITEMS[params], name: "odd"}
            response = await client.post("/v1/responses", json={"input": [item]})
            assert response.status_code == 400, name
            assert name in response.json()["error"]["message"]


@pytest.mark.parametrize("field", ["thinking", "tool_choice", "output_config"])
async def test_part_of_an_anthropic_option_is_known_or_refused(field):
    """An option's own fields are not dropped either."""
    whole = {"thinking": {"type": "enabled"}, "tool_choice": {"type": "auto"}, "output_config": {}}
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    body = {**MESSAGES, "messages": [{"role": "user", "content": "a"}], "tools": tools}
    async with connected(FakeEngine()) as client:
        response = await client.post(
            "/v1/messages", json={**body, field: {**whole[field], "odd": 1}}
        )
    assert response.status_code == 400
    assert "odd" in response.json()["error"]["message"]
