"""Makes a request of what a user passes in: checked once, tokenized, complete."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from quire.core.engine.features import (
    FeatureReader,
    ModelInput,
    check_features,
    refuse_features,
    refuse_images,
)
from quire.core.engine.generation_defaults import GenerationDefaults
from quire.core.engine.grammars import constraint_of
from quire.core.engine.prompts import ParsedPrompt, Prompt, parse_prompt
from quire.core.engine.sampling_spec import check_token_ids, make_sampling_spec, wrap_seed
from quire.core.engine.tokenizer import TextCodec, no_tokenizer
from quire.core.errors import RequestError
from quire.core.sampling_params import MAX_SEED, SamplingParams
from quire.core.scheduler.request import RequestSpec

_LONG_TEXT_CHARS = 2000
"""From here a text is tokenized in a thread, so that the event loop goes on."""
_NEVER = -1e9
"""Added to the logit of a token that must not be chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A user's request, ready for the core."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    specs: list[RequestSpec]
    """One for each of the `n` outputs."""
    codec: TextCodec | None
    """None: no text is wanted, or none can be made."""
    arrival_time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What requests are checked against."""

    model: str
    vocab_size: int
    max_model_len: int
    logits_processors: frozenset[str]
    """Names that the worker knows."""
    max_source_tokens: int = 0
    """The most tokens that the model's encoder makes of what a request brings."""


class InputProcessor:
    """Validates and tokenizes. Holds the engine's random numbers, from which seeds are drawn."""

    def __init__(
        self,
        limits: ModelLimits,
        *,
        codec: TextCodec | None,
        defaults: GenerationDefaults,
        seed: int,
        name_function: Callable[[Any], str] | None = None,
        reader: FeatureReader | None = None,
        why_no_images: Callable[[], str] | None = None,
    ) -> None:
        """`name_function` registers a logits processor with the worker.

        None where the worker is out of reach. `reader`: of a model that takes more than text.
        `why_no_images` tells the cause where the model takes none.
        """
        self._reader = reader
        self._why_no_images = why_no_images
        self._limits = limits
        self._codec = codec
        self._seeds = random.Random(seed)
        self._name_function = name_function
        self.defaults = defaults
        self.eos_token_ids = _eos_ids(defaults, codec, limits.vocab_size)

    def prepare(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int | None = None,
        add_special_tokens: bool = True,
        model_input: ModelInput | None = None,
    ) -> PreparedRequest:
        """One request, complete. `model_input`: the prompt's, if it was read already.

        Raises: RequestError naming the field; CheckpointError for text where the model has
        no tokenizer.
        """
        arrival_time_s = time.monotonic()
        parsed = parse_prompt(prompt)
        if model_input is None:
            model_input = self.read(parsed, add_special_tokens=add_special_tokens)
        prompt_token_ids = model_input.token_ids
        if params.truncate_prompt_tokens is not None:
            _refuse_cut_images(model_input, params.truncate_prompt_tokens)
            prompt_token_ids = prompt_token_ids[-params.truncate_prompt_tokens :]
        self._check_prompt(prompt_token_ids)
        self._check_text(params)
        check_features(model_input.features, self._limits.max_source_tokens)
        spec = self._spec(request_id, prompt_token_ids, params, priority, arrival_time_s)
        spec = _with_input(spec, model_input)
        return PreparedRequest(
            request_id=request_id,
            prompt=parsed.text if model_input.text is None else model_input.text,
            prompt_token_ids=prompt_token_ids,
            params=params,
            specs=_children(spec, params.n),
            codec=self._codec if params.detokenize else None,
            arrival_time_s=arrival_time_s,
        )

    def read(self, parsed: ParsedPrompt, *, add_special_tokens: bool = True) -> ModelInput:
        """Token ids and features of a prompt; safe in another thread.

        Raises: RequestError for what the model does not take; CheckpointError for text where it
        has no tokenizer.
        """
        if self._why_no_images is not None:
            refuse_images(parsed, self._limits.model, self._why_no_images)
        if self._reader is None:
            refuse_features(parsed, self._limits.model)
            return ModelInput(
                token_ids=self.tokenize(parsed, add_special_tokens=add_special_tokens)
            )
        return self._reader.read(parsed, self._encode, add_special_tokens=add_special_tokens)

    @property
    def reader(self) -> FeatureReader | None:
        """Of a model that takes more than text."""
        return self._reader

    def is_slow(self, parsed: ParsedPrompt) -> bool:
        """Whether reading the prompt would hold up an event loop."""
        is_long = parsed.token_ids is None and len(parsed.text or "") >= _LONG_TEXT_CHARS
        return is_long or self._reader is not None or not parsed.is_plain

    def _encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.require_codec().encode(text, add_special_tokens=add_special_tokens)

    def tokenize(self, parsed: ParsedPrompt, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt; safe in another thread.

        Raises: CheckpointError for text where the model has no tokenizer.
        """
        if parsed.token_ids is not None:
            return parsed.token_ids
        if parsed.text is None:
            raise RequestError("the prompt has no text", param="prompt")
        return self.require_codec().encode(parsed.text, add_special_tokens=add_special_tokens)

    def require_codec(self) -> TextCodec:
        """The codec. Raises: CheckpointError with the remedy if the model has none."""
        if self._codec is None:
            raise no_tokenizer(self._limits.model)
        return self._codec

    def _check_prompt(self, token_ids: Sequence[int]) -> None:
        limit = self._limits.max_model_len
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        if len(token_ids) >= limit:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; the context is {limit} tokens and one "
                "must be left for the output; shorten it or set truncate_prompt_tokens",
                param="prompt",
            )
        check_token_ids(token_ids, self._limits.vocab_size, "prompt")

    def _check_text(self, params: SamplingParams) -> None:
        if params.stop_strings and self._codec is None:
            raise RequestError(
                "stop strings need text and the model has no tokenizer; use stop_token_ids",
                param="stop",
            )

    def _spec(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        priority: int | None,
        arrival_time_s: float,
    ) -> RequestSpec:
        room = self._limits.max_model_len - len(token_ids)
        seed = self._seeds.randint(0, MAX_SEED) if params.seed is None else params.seed
        sampling = make_sampling_spec(
            params,
            seed=seed,
            vocab_size=self._limits.vocab_size,
            eos_token_ids=self.eos_token_ids,
            codec=self._codec,
            logits_processors=self._processor_names(params),
        )
        return RequestSpec(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling=sampling,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            eos_token_ids=() if params.ignore_eos else self.eos_token_ids,
            stop_token_ids=tuple(dict.fromkeys(params.stop_token_ids or ())),
            priority=params.priority if priority is None else priority,
            arrival_time_s=arrival_time_s,
            cache_salt=params.cache_salt,
            constraint=constraint_of(params, self._codec),
        )

    def _processor_names(self, params: SamplingParams) -> tuple[str, ...]:
        return tuple(self._processor_name(item) for item in params.logits_processors or ())

    def _processor_name(self, processor: object) -> str:
        known = self._limits.logits_processors
        if isinstance(processor, str):
            if processor in known:
                return processor
            raise RequestError(
                f"logits processor {processor!r} is not registered; known are "
                f"{', '.join(sorted(known)) or 'none'} (see the setting logits_processors)",
                param="logits_processors",
            )
        if not callable(processor) or self._name_function is None:
            raise RequestError(
                f"logits processor {processor!r} is no name; functions can be given to an LLM in "
                "this process alone; register module:function under a name with the setting "
                "logits_processors",
                param="logits_processors",
            )
        return self._name_function(processor)


def _refuse_cut_images(model_input: ModelInput, limit: int) -> None:
    """Raises: RequestError if a prompt would be cut whose features stand at places of it."""
    is_cut = len(model_input.token_ids) > limit
    if is_cut and any(feature.offset is not None for feature in model_input.features):
        raise RequestError(
            f"the prompt has {len(model_input.token_ids)} tokens, images included, and would be "
            f"cut to {limit}; send fewer or smaller images, or leave truncate_prompt_tokens out",
            param="truncate_prompt_tokens",
        )


def _with_input(spec: RequestSpec, model_input: ModelInput) -> RequestSpec:
    """The request with its features, and without the tokens that the model must not make."""
    sampling = spec.sampling
    if model_input.suppressed_ids:
        bias = dict.fromkeys(model_input.suppressed_ids, _NEVER) | dict(sampling.logit_bias)
        sampling = msgspec.structs.replace(sampling, logit_bias=tuple(bias.items()))
    if model_input.begin_suppressed_ids:
        forbidden = dict.fromkeys((*sampling.min_tokens_forbids, *model_input.begin_suppressed_ids))
        sampling = msgspec.structs.replace(
            sampling,
            min_tokens=max(1, sampling.min_tokens),
            min_tokens_forbids=tuple(forbidden),
        )
    return msgspec.structs.replace(spec, sampling=sampling, features=model_input.features)


def make_params(
    given: SamplingParams | Mapping[str, Any] | None, defaults: GenerationDefaults
) -> SamplingParams:
    """Sampling parameters as given; None: the model's own defaults.

    Raises: RequestError for anything else.
    """
    if given is None:
        return SamplingParams.from_user(**defaults.sampling)
    if isinstance(given, SamplingParams):
        return given
    if isinstance(given, Mapping):
        return SamplingParams.from_user(**given)
    raise RequestError(
        f"sampling_params is {type(given).__name__}; give SamplingParams", param="sampling_params"
    )


def _children(spec: RequestSpec, num_outputs: int) -> list[RequestSpec]:
    """One request for each output; output i draws from seed + i, and the prompt is told of once."""
    if num_outputs == 1:
        return [spec]
    return [
        msgspec.structs.replace(
            spec,
            request_id=f"{spec.request_id}#{index}",
            sampling=msgspec.structs.replace(
                spec.sampling,
                seed=wrap_seed(spec.sampling.seed + index),
                num_prompt_logprobs=spec.sampling.num_prompt_logprobs if index == 0 else None,
            ),
        )
        for index in range(num_outputs)
    ]


def _eos_ids(
    defaults: GenerationDefaults, codec: TextCodec | None, vocab_size: int
) -> tuple[int, ...]:
    ids = list(defaults.eos_token_ids)
    if codec is not None and codec.eos_token_id is not None:
        ids.append(codec.eos_token_id)
    return tuple(dict.fromkeys(token_id for token_id in ids if 0 <= token_id < vocab_size))
