"""How many tokens a request took."""

from __future__ import annotations

from quire.core.serving.protocol.base import ResponseBody


class PromptTokensDetails(ResponseBody):
    """Where the prompt's tokens came from."""

    cached_tokens: int
    """Tokens that the prefix cache held."""


class Usage(ResponseBody):
    """Tokens of one HTTP request; a prompt counts once, however many outputs it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, *, prompt: int, completion: int, cached: int) -> Usage:
        """The usage for these counts."""
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )
