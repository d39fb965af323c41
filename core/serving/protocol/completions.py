"""`/v1/completions`: its request, response and chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from quire.core.errors import RequestError
from quire.core.sampling_params import SamplingParams
from quire.core.serving.protocol.base import Count, ResponseBody, TokenId
from quire.core.serving.protocol.sampling import SamplingFields
from quire.core.serving.protocol.usage import Usage

PromptLogprobs = list[dict[str, dict[str, Any]] | None]
"""For each prompt token: by token id its log-probability, rank and text; None for the first."""


def _checked_prompt(given: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Says in one sentence what a prompt may be, instead of one for each of its forms."""
    try:
        return handler(given)
    except ValidationError as error:
        raise PydanticCustomError(
            "prompt_type", "must be a text, token ids in [0, 2^31), or a list of either"
        ) from error


class CompletionRequest(SamplingFields):
    """A text, or token ids, to continue."""

    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "suffix": ("",),
        "use_beam_search": (False,),
        "prompt_embeds": (),
        "kv_transfer_params": (),
        "length_penalty": (1.0, 1),
    }
    ignored_fields: ClassVar[frozenset[str]] = frozenset(
        {"user", "metadata", "safety_identifier", "prompt_cache_key"}
    )

    model: str | None = None
    prompt: Annotated[
        str | list[str] | list[TokenId] | list[list[TokenId]], WrapValidator(_checked_prompt)
    ]
    max_tokens: Count | None = 16
    """0: nothing is generated, for the log-probabilities of an echoed prompt."""
    logprobs: Count | None = None
    echo: bool | None = None
    best_of: Count | None = None
    """Only as much as `n`: there is no choosing among more."""
    add_special_tokens: bool | None = None

    @property
    def generates_nothing(self) -> bool:
        """Whether only the prompt is asked about."""
        return self.max_tokens == 0

    def to_sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """What the engine is asked for; `defaults` are those of the model.

        Raises: RequestError naming the field.
        """
        settings = self.sampling_settings(defaults)
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError(
                f"best_of is {self.best_of} and n is {self.n or 1}; choosing the best of more "
                "outputs than are returned is not supported, leave best_of out",
                param="best_of",
            )
        # One token is the least that the engine computes; it is dropped from the answer.
        settings["max_tokens"] = 1 if self.generates_nothing else self.max_tokens
        if self.generates_nothing and self.min_tokens:
            raise RequestError("min_tokens exceeds max_tokens 0", param="min_tokens")
        settings["logprobs"] = self.logprobs
        if self.echo and self.logprobs is not None:
            settings["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return SamplingParams(**settings)


class CompletionLogprobs(ResponseBody):
    """Log-probabilities in columns, one entry for each token of the text."""

    text_offset: list[int]
    """Where the token begins in the choice's text, in characters."""
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(ResponseBody):
    """One output, or what was added to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    """The stop string or token id that ended it."""
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class CompletionResponse(ResponseBody):
    """The whole answer, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    """Seconds since the epoch."""
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
