"""`POST /tokenize` and `POST /detokenize`."""

from __future__ import annotations

import pydantic_core
from fastapi import APIRouter, Request, Response

from quire.core.serving.http.bodies import read_body
from quire.core.serving.protocol.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeChatRequest,
    TokenizeResponse,
    TokenizeTextRequest,
)
from quire.core.serving.routes.chat import render
from quire.core.serving.server_state import Server, ServerState

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request, server: Server) -> Response:
    """Cuts a text (`prompt`) or a conversation (`messages`) into tokens."""
    if _is_chat(await request.body()):
        chat = await read_body(request, TokenizeChatRequest)
        server.check_model(chat.model)
        text, adds_special = await render(chat, server), bool(chat.add_special_tokens)
        wants_texts = chat.return_token_strs
    else:
        plain = await read_body(request, TokenizeTextRequest)
        server.check_model(plain.model)
        text, adds_special = plain.prompt, plain.add_special_tokens
        wants_texts = plain.return_token_strs
    tokens = await server.engine.encode(text, add_special_tokens=adds_special)
    return _answer(await _response(server, tokens, wants_texts=bool(wants_texts)))


@router.post("/detokenize")
async def detokenize(request: Request, server: Server) -> Response:
    """Makes text of tokens."""
    body = await read_body(request, DetokenizeRequest)
    server.check_model(body.model)
    text = await server.engine.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)
    return _answer(DetokenizeResponse(prompt=text))


async def _response(
    server: ServerState, tokens: list[int], *, wants_texts: bool
) -> TokenizeResponse:
    response = TokenizeResponse(
        count=len(tokens), max_model_len=server.engine.facts.max_model_len, tokens=tokens
    )
    if wants_texts:
        response.token_strs = [await server.engine.decode([token]) for token in tokens]
    return response


def _is_chat(raw: bytes) -> bool:
    try:
        data = pydantic_core.from_json(raw)
    except ValueError:
        return False
    return isinstance(data, dict) and "messages" in data


def _answer(body: TokenizeResponse | DetokenizeResponse) -> Response:
    return Response(body.to_json(), media_type="application/json")
