"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from quire.core.serving.protocol.base import RequestBody, ResponseBody, TokenId
from quire.core.serving.protocol.chat import TemplateFields


class TokenizeTextRequest(RequestBody):
    """A text to cut into tokens."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class TokenizeChatRequest(TemplateFields):
    """A conversation to cut into tokens."""

    model: str | None = None
    return_token_strs: bool | None = None


class TokenizeResponse(ResponseBody):
    """The tokens, and how many a request may have."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestBody):
    """Tokens to make text of."""

    model: str | None = None
    tokens: list[TokenId]
    skip_special_tokens: bool = False


class DetokenizeResponse(ResponseBody):
    """The text of the tokens."""

    prompt: str
