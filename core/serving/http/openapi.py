"""The OpenAPI document: what the routes read and write by themselves, said for clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from quire.core.serving.protocol import (
    audio,
    chat,
    completions,
    messages,
    models,
    pooling,
    responses,
    server,
    tgi,
    tokens,
)
from quire.core.serving.protocol.errors import ErrorBody

Models = tuple[type[BaseModel], ...]

_ASKED: dict[str, Models] = {
    "/": (tgi.GenerateRequest,),
    "/classify": (pooling.ClassificationRequest,),
    "/detokenize": (tokens.DetokenizeRequest,),
    "/generate": (tgi.GenerateRequest,),
    "/generate_stream": (tgi.GenerateRequest,),
    "/pooling": (pooling.PoolingRequest,),
    "/rerank": (pooling.RerankRequest,),
    "/score": (pooling.ScoreRequest,),
    "/tokenize": (tokens.TokenizeTextRequest, tokens.TokenizeChatRequest),
    "/v1/chat/completions": (chat.ChatRequest,),
    "/v1/completions": (completions.CompletionRequest,),
    "/v1/embeddings": (pooling.EmbeddingRequest,),
    "/v1/messages": (messages.MessagesRequest,),
    "/v1/messages/count_tokens": (messages.MessagesFields,),
    "/v1/rerank": (pooling.RerankRequest,),
    "/v1/responses": (responses.ResponsesRequest,),
    "/v1/score": (pooling.ScoreRequest,),
    "/v2/rerank": (pooling.RerankRequest,),
}
"""Path to the body that is sent there, as JSON."""
_FORMS: dict[str, type[BaseModel]] = {
    "/v1/audio/transcriptions": audio.TranscriptionForm,
    "/v1/audio/translations": audio.TranslationForm,
}
"""Path to the fields of the form that is sent there, beside its file."""
_GIVEN: dict[tuple[str, str], Models] = {
    ("post", "/classify"): (pooling.ClassificationResponse,),
    ("post", "/detokenize"): (tokens.DetokenizeResponse,),
    ("post", "/generate"): (tgi.GenerateResponse,),
    ("post", "/pooling"): (pooling.PoolingResponse,),
    ("post", "/rerank"): (pooling.RerankResponse,),
    ("post", "/score"): (pooling.ScoreResponse,),
    ("post", "/tokenize"): (tokens.TokenizeResponse,),
    ("post", "/v1/audio/transcriptions"): (audio.Transcript, audio.VerboseTranscript),
    ("post", "/v1/audio/translations"): (audio.Transcript, audio.VerboseTranscript),
    ("post", "/v1/chat/completions"): (chat.ChatResponse,),
    ("post", "/v1/completions"): (completions.CompletionResponse,),
    ("post", "/v1/embeddings"): (pooling.EmbeddingResponse,),
    ("post", "/v1/messages"): (messages.MessagesAnswer,),
    ("post", "/v1/messages/count_tokens"): (messages.TokenCount,),
    ("post", "/v1/rerank"): (pooling.RerankResponse,),
    ("post", "/v1/responses"): (responses.ResponseObject,),
    ("post", "/v1/responses/{response_id}/cancel"): (responses.ResponseObject,),
    ("post", "/v1/score"): (pooling.ScoreResponse,),
    ("post", "/v2/rerank"): (pooling.RerankResponse,),
    ("get", "/info"): (tgi.TgiInfo,),
    ("get", "/load"): (models.LoadResponse,),
    ("get", "/v1/models"): (models.ModelList,),
    ("get", "/v1/models/{name}"): (models.ModelCard,),
    ("get", "/v1/responses/{response_id}"): (responses.ResponseObject,),
    ("get", "/v1/responses/{response_id}/input_items"): (responses.InputItemList,),
    ("get", "/v1/server"): (server.ServerFacts,),
    ("get", "/version"): (models.VersionResponse,),
    ("delete", "/v1/responses/{response_id}"): (responses.DeletedResponse,),
}
"""Method and path to the JSON that comes back."""
_TEXTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("post", "/v1/audio/transcriptions"): ("text/plain", "text/vtt"),
    ("post", "/v1/audio/translations"): ("text/plain", "text/vtt"),
    ("get", "/metrics"): ("text/plain",),
}
_STREAMED = frozenset(
    {
        *("/", "/generate_stream", "/v1/chat/completions", "/v1/completions", "/v1/messages"),
        *("/v1/responses", "/v1/audio/transcriptions"),
    }
)
"""Paths that answer with events, always or where that is asked."""
_EVENT = {
    "type": "object",
    "description": "One server-sent event; its data is JSON, or [DONE] at the end",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_EMPTY = frozenset({"/health", "/live", "/ready"})
_OWN_ERRORS: dict[str, type[BaseModel]] = {
    "/": tgi.TgiError,
    "/generate": tgi.TgiError,
    "/generate_stream": tgi.TgiError,
    "/v1/messages": messages.AnthropicError,
    "/v1/messages/count_tokens": messages.AnthropicError,
}
"""Paths whose API has errors of its own form; keys and sizes are refused in the common one."""
_REF = "#/components/schemas/{model}"


def make_document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of an application."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    models_told = sorted(_all_models(), key=lambda model: model.__name__)
    pairs = [(model, "validation") for model in models_told]
    refs, definitions = models_json_schema(pairs, ref_template=_REF)  # type: ignore[arg-type]
    document.setdefault("components", {})["schemas"] = definitions.get("$defs", {})
    schemas = {model: refs[(model, "validation")] for model in models_told}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            _fill(operation, method, path, schemas)
    told = document["components"]["schemas"]
    for path, form in _FORMS.items():
        content = {"multipart/form-data": {"schema": _with_file(told[form.__name__])}}
        body = {"required": True, "content": content}
        document["paths"][path]["post"]["requestBody"] = body
    return document


def _fill(
    operation: dict[str, Any], method: str, path: str, schemas: Mapping[type[BaseModel], Any]
) -> None:
    if method == "post" and path in _ASKED:
        content = {"application/json": {"schema": _one_of(_ASKED[path], schemas)}}
        operation["requestBody"] = {"required": True, "content": content}
    answers = operation["responses"]
    answers.pop("422", None)
    if content_given := _content_given(method, path, schemas):
        answers["200"]["content"] = content_given
    elif path in _EMPTY:
        answers["200"].pop("content", None)
    errors = _one_of((ErrorBody, *filter(None, [_OWN_ERRORS.get(path)])), schemas)
    answers["default"] = {
        "description": "Refused or failed",
        "content": {"application/json": {"schema": errors}},
    }


def _content_given(
    method: str, path: str, schemas: Mapping[type[BaseModel], Any]
) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if (method, path) in _GIVEN:
        content["application/json"] = {"schema": _one_of(_GIVEN[(method, path)], schemas)}
    if (method, path) == ("post", "/"):
        whole = {"type": "array", "items": schemas[tgi.GenerateResponse]}
        content["application/json"] = {"schema": whole}
    for kind in _TEXTS.get((method, path), ()):
        content[kind] = {"schema": {"type": "string"}}
    if method == "post" and path in _STREAMED:
        content["text/event-stream"] = {"schema": _EVENT}
    return content


def _one_of(given: Models, schemas: Mapping[type[BaseModel], Any]) -> Any:
    if len(given) == 1:
        return schemas[given[0]]
    return {"anyOf": [schemas[model] for model in given]}


def _with_file(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A form's fields and its file, which no model names."""
    file = {"type": "string", "format": "binary", "description": "WAV, FLAC, OGG or MP3"}
    return {**fields, "properties": {**fields["properties"], "file": file}, "required": ["file"]}


def _all_models() -> set[type[BaseModel]]:
    found: set[type[BaseModel]] = {ErrorBody, tgi.GenerateResponse}
    found.update(*_ASKED.values(), *_GIVEN.values(), _FORMS.values(), _OWN_ERRORS.values())
    return found
