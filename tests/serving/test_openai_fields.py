"""Every field of the OpenAI API's own type definitions is honoured or refused by name."""

from __future__ import annotations

import typing

import pytest
from asking import connected
from fake_engine import FakeEngine, facts
from openai.types import completion_create_params, embedding_create_params
from openai.types.audio import transcription_create_params, translation_create_params
from openai.types.chat import chat_completion_stream_options_param
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params, response_text_config_param
from openai.types.shared_params import reasoning

from quire.core.serving.protocol import responses
from quire.core.serving.protocol.audio import TranscriptionForm, TranslationForm
from quire.core.serving.protocol.base import RequestBody
from quire.core.serving.protocol.chat import ChatRequest
from quire.core.serving.protocol.completions import CompletionRequest
from quire.core.serving.protocol.pooling import EmbeddingRequest
from quire.core.serving.protocol.responses import ResponsesRequest
from quire.core.serving.protocol.sampling import StreamOptions

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
]
NOT_IN_THE_BODY = {"file"}
"""A form's file is no field of the model: the route takes it itself."""
MAY_BE_IGNORED = {
    *("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
}
"""What says something about the caller and changes nothing about the answer."""
BODIES = {
    "/v1/chat/completions": (ChatRequest, {"messages": [{"role": "user", "content": "a"}]}),
    "/v1/completions": (CompletionRequest, {"prompt": "a"}),
    "/v1/responses": (ResponsesRequest, {"input": "a"}),
    "/v1/embeddings": (EmbeddingRequest, {"input": "a"}),
}


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
