"""Reads a request's body into its model."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request

from quire.core.serving.protocol.base import RequestBody

Body = TypeVar("Body", bound=RequestBody)


async def read_body(request: Request, model: type[Body]) -> Body:
    """The request's JSON as `model`.

    The bytes are parsed by pydantic itself: unlike Python's own parser it refuses lone surrogates,
    which no tokenizer takes and no response could carry. The content type is not looked at.
    Raises: ValidationError with all that is wrong; RequestError for what is not supported;
    ClientDisconnect.
    """
    return model.model_validate_json(await request.body())
