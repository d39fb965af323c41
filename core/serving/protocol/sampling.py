"""The fields with which both completion endpoints ask for tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from quire.core.errors import RequestError
from quire.core.serving.protocol.base import Count, RequestBody, TokenId
from quire.core.serving.protocol.structured import StructuredFields

MAX_BIAS = 100.0
"""The largest bias of a logit, either way, as the OpenAI API has it."""
MAX_STOPS = 128
MAX_BAD_WORDS = 1024
"""What is looked for at every token is not without end."""

_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "prompt_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "logits_processors",
    "truncate_prompt_tokens",
    "priority",
    "cache_salt",
)


class StreamOptions(RequestBody):
    """What a stream tells besides the text."""

    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}

    include_usage: bool | None = None
    """A last chunk with the usage of the whole request."""
    continuous_usage_stats: bool | None = None
    """The usage so far in every chunk."""


class SamplingFields(StructuredFields):
    """Settings that become SamplingParams under the same name. None: the default."""

    n: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: Count | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    prompt_logprobs: Count | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = Field(default=None, max_length=MAX_BAD_WORDS)
    logits_processors: list[str] | None = None
    """Names registered with the engine."""
    truncate_prompt_tokens: Count | None = None
    priority: Count | None = None
    cache_salt: str | None = Field(default=None, max_length=1024)
    return_token_ids: bool | None = None
    """Token ids of prompt and output beside the text."""
    return_tokens_as_token_ids: bool | None = None
    """In log-probabilities, tokens as `token_id:123`, since several tokens may read the same."""
    request_id: str | None = Field(default=None, min_length=1, max_length=128, pattern=r"^[!-~]+$")

    @property
    def is_streaming(self) -> bool:
        """Whether the client wants server-sent events."""
        return bool(self.stream)

    @property
    def streams_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def streams_usage_continuously(self) -> bool:
        """Whether each chunk carries the usage so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def sampling_settings(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of SamplingParams, as far as both endpoints name them alike.

        `defaults` are those of the model, for what the request leaves open.
        Raises: RequestError for fields that contradict each other.
        """
        if self.stream_options is not None and not self.is_streaming:
            raise RequestError(
                "stream_options is given without stream=true; leave it out or stream",
                param="stream_options",
            )
        settings = {name: value for name, value in defaults.items() if name in _SAME_NAME}
        for name in _SAME_NAME:
            value = getattr(self, name)
            if value is not None:
                settings[name] = value
        if self.logit_bias is not None:
            settings["logit_bias"] = _bias_of(self.logit_bias)
        structure = self.structure()
        if structure is not None:
            settings["structured_outputs"] = structure
        return settings


def _bias_of(given: dict[str, float]) -> dict[int, float]:
    biases = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise RequestError(
                f"logit_bias has the key {key[:40]!r}; keys are token ids", param="logit_bias"
            )
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise RequestError(
                f"logit_bias of token {key} is {bias}; it must be in [-{MAX_BIAS:g}, {MAX_BIAS:g}]",
                param="logit_bias",
            )
        biases[int(key)] = bias
    return biases
