"""`/generate`, `/generate_stream` and `/info` as text-generation-inference has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from quire.core.errors import RequestError
from quire.core.sampling_params import SamplingParams, StructuredOutputsParams
from quire.core.serving.protocol.base import Count, RequestBody, ResponseBody

DEFAULT_MAX_NEW_TOKENS = 100
_SAMPLES = ("temperature", "top_k", "top_p", "typical_p")
"""Any of these asks for sampling, as `do_sample` does."""


class TgiGrammar(RequestBody):
    """The form of the output."""

    type: Literal["json", "json_schema", "regex"]
    value: str | dict[str, Any]
    """A schema; for `json_schema` one with a name, `{"name": ..., "schema": {...}}`."""

    def to_params(self) -> StructuredOutputsParams:
        """What the engine is asked for. Raises: RequestError for a value of the wrong kind."""
        value = self.value
        if self.type == "regex" and isinstance(value, str):
            return StructuredOutputsParams(regex=value)
        if self.type == "json":
            return StructuredOutputsParams(json=value)
        if self.type == "json_schema" and isinstance(value, dict) and "schema" in value:
            return StructuredOutputsParams(json=value["schema"])
        wanted = "a text" if self.type == "regex" else "an object with a schema"
        raise RequestError(f"grammar of type {self.type} needs {wanted}", param="grammar")


class GenerateParameters(RequestBody):
    """How to continue. Without any of the fields that sample, the likeliest token is taken."""

    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "adapter_id": (),
        "best_of": (1,),
        "typical_p": (1.0, 1),
        "watermark": (False,),
    }

    max_new_tokens: Count | None = Field(default=None, gt=0)
    do_sample: bool | None = None
    temperature: float | None = Field(default=None, gt=0)
    top_k: Count | None = Field(default=None, gt=0)
    top_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: Count | None = Field(default=None, ge=0)
    truncate: Count | None = Field(default=None, gt=0)
    grammar: TgiGrammar | None = None

    @property
    def is_sampling(self) -> bool:
        """Whether chance chooses."""
        return bool(self.do_sample) or any(getattr(self, n, None) is not None for n in _SAMPLES)

    def to_sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """What the engine is asked for. Raises: RequestError naming the field."""
        settings: dict[str, Any] = {"max_tokens": self.max_new_tokens or DEFAULT_MAX_NEW_TOKENS}
        if self.is_sampling:
            settings |= {n: defaults[n] for n in ("top_k", "top_p", "temperature") if n in defaults}
        else:
            settings["temperature"] = 0.0
        for name in (*_SAMPLES[:3], "repetition_penalty", "frequency_penalty", "seed", "stop"):
            value = getattr(self, name)
            if value is not None:
                settings[name] = value
        # Each token's own log-probability is part of every answer with details.
        settings["logprobs"] = self.top_n_tokens or 0
        if self.decoder_input_details:
            settings["prompt_logprobs"] = 0
        if self.truncate is not None:
            settings["truncate_prompt_tokens"] = self.truncate
        if self.grammar is not None:
            settings["structured_outputs"] = self.grammar.to_params()
        return SamplingParams(**settings)


class GenerateRequest(RequestBody):
    """A text to continue."""

    inputs: str
    parameters: GenerateParameters | None = None
    stream: bool | None = None
    """Only at `/`, which serves both."""

    @property
    def settings(self) -> GenerateParameters:
        """The parameters, also where none were given."""
        return self.parameters or GenerateParameters()

    def check_stream(self, *, is_expected: bool) -> None:
        """Raises: RequestError if `stream` contradicts the path."""
        if self.stream is not None and self.stream != is_expected:
            path = "/generate_stream" if self.stream else "/generate"
            raise RequestError(f"stream is {self.stream}; send it to {path}", param="stream")


class TgiToken(ResponseBody):
    """A token that was written."""

    id: int
    text: str
    logprob: float | None
    special: bool


class TgiPromptToken(ResponseBody):
    """A token of the prompt."""

    id: int
    text: str
    logprob: float | None


class TgiDetails(ResponseBody):
    """How a whole text came to be."""

    finish_reason: str
    """`length`, `eos_token` or `stop_sequence`."""
    generated_tokens: int
    seed: int | None
    prefill: list[TgiPromptToken]
    tokens: list[TgiToken]
    top_tokens: list[list[TgiToken]] | None = None


class TgiStreamDetails(ResponseBody):
    """What the last event says of all."""

    finish_reason: str
    generated_tokens: int
    input_length: int
    seed: int | None


class GenerateResponse(ResponseBody):
    """A whole text."""

    generated_text: str
    details: TgiDetails | None = None


class StreamResponse(ResponseBody):
    """One token of a stream."""

    index: int
    token: TgiToken
    top_tokens: list[TgiToken] | None = None
    generated_text: str | None
    details: TgiStreamDetails | None


class TgiInfo(ResponseBody):
    """What serves."""

    model_id: str
    model_dtype: str
    model_device_type: str
    max_concurrent_requests: int | None
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    router: str
    version: str


class TgiError(ResponseBody):
    """As text-generation-inference reports errors."""

    error: str
    error_type: str
