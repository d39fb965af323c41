"""How a user asks for tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from quire.core.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    LogitsProcessor = Callable[[Sequence[int], Sequence[int], Tensor], Tensor]
    """(prompt token ids, output token ids, logits float32 [V]) to logits float32 [V]."""

MAX_SEED = 2**63 - 1


@dataclass(slots=True, kw_only=True)
class StructuredOutputsParams:
    """What an output must look like; exactly one form. The names are those of vLLM.

    Raises: RequestError, unless one form is given and of the right type.
    """

    json: str | Mapping[str, Any] | None = None
    """A JSON schema."""
    regex: str | None = None
    choice: Sequence[str] | None = None
    """The output is one of these texts."""
    grammar: str | None = None
    """EBNF with rules `name ::= ...`, the first or `root` begins; or Lark, from `start:`."""
    json_object: bool | None = None
    """Any JSON object."""
    structural_tag: str | Mapping[str, Any] | None = None
    """JSON with `structures` (each `begin`, `schema`, `end`) and `triggers`: free text in which a
    trigger obliges to one of the structures. With `otherwise`, a schema, there is no free text:
    the output is JSON of that schema, or else structures alone, several only with `between`.
    """
    disable_any_whitespace: bool = False
    """JSON without spaces between its tokens."""
    disable_additional_properties: bool = False
    """JSON objects have no properties but those of the schema."""
    whitespace_pattern: str | None = None
    """A regular expression of what may stand between the tokens of JSON."""
    starts_after: str | None = None
    """Everything may be said up to this text, as `</think>`; the form holds for what follows."""

    def __post_init__(self) -> None:
        problems = list(_structure_problems(self))
        if problems:
            raise RequestError("; ".join(problems), param="structured_outputs")

    @property
    def forms(self) -> tuple[str, ...]:
        """Which forms are given."""
        return tuple(name for name in _STRUCTURED_FORMS if getattr(self, name) not in (None, False))


_STRUCTURED_FORMS: dict[str, tuple[type, ...]] = {
    "json": (str, Mapping, bool),
    "regex": (str,),
    "choice": (Sequence,),
    "grammar": (str,),
    "json_object": (bool,),
    "structural_tag": (str, Mapping),
}


def _structure_problems(given: StructuredOutputsParams) -> Iterator[str]:
    forms = given.forms
    if len(forms) != 1:
        yield (
            f"structured_outputs has {len(forms)} forms ({', '.join(forms) or 'none'}); give one "
            f"of {', '.join(_STRUCTURED_FORMS)}"
        )
    for name in forms:
        value = getattr(given, name)
        is_choice = name == "choice" and not _is_sequence_of(value, str)
        if not isinstance(value, _STRUCTURED_FORMS[name]) or is_choice:
            yield f"structured_outputs.{name} is {type(value).__name__}, which it cannot be"
    for name in ("whitespace_pattern", "starts_after"):
        value = getattr(given, name)
        if value is not None and (not isinstance(value, str) or not value):
            yield f"structured_outputs.{name} is {value!r}; it must be a text"


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingLimit:
    """At most so many tokens of thoughts; then their end is written in the model's place.

    Raises: RequestError for a limit or an end that is none.
    """

    end: str
    """What ends thoughts, as `</think>`."""
    max_tokens: int
    begin: str | None = None
    """What an output that thinks begins with, as `<think>`; without it nothing is counted. None:
    the prompt has opened the thoughts.
    """

    def __post_init__(self) -> None:
        problem = _Range(1, _INF, is_whole=True).problem("max_tokens", self.max_tokens)
        if problem or not self.end or self.begin == "":
            problem = problem or "begin and end must be texts"
            raise RequestError(f"thinking_limit.{problem}", param="thinking_limit")


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """Settings of one request; the names are those of vLLM and the OpenAI API.

    Raises: RequestError that names every bad field, on construction.
    """

    n: int = 1
    """Outputs for each prompt."""
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: no limit."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """None: one is drawn from the engine's seed."""
    stop: str | Sequence[str] | None = None
    """Strings at which the output ends; not part of it unless `include_stop_str_in_output`."""
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """None: as many as the context allows."""
    min_tokens: int = 0
    """No end before so many tokens."""
    logprobs: int | None = None
    """n: of the chosen token and the n most likely ones."""
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    """Words that may not be produced."""
    logits_processors: Sequence[str | LogitsProcessor] | None = None
    """Names registered with the engine or, offline, functions."""
    truncate_prompt_tokens: int | None = None
    """Keep the last so many tokens of the prompt."""
    priority: int = 0
    """For `scheduling_policy="priority"`: a lower number goes first."""
    cache_salt: str | None = None
    """Prompts share cached prefixes only with prompts of the same salt."""
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    """What the output must look like: a schema, an expression, a grammar."""
    thinking_limit: ThinkingLimit | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Untouched by the engine; comes back with the output."""

    def __post_init__(self) -> None:
        if isinstance(self.structured_outputs, Mapping):
            self.structured_outputs = _read_structure(self.structured_outputs)
        problems = list(_problems(self))
        if problems:
            raise RequestError("; ".join(text for _, text in problems), param=problems[0][0])

    @classmethod
    def from_user(cls, **settings: Any) -> SamplingParams:
        """Params from keyword settings.

        Raises: RequestError for an unknown field, naming it.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise RequestError(
                f"unknown sampling field {', '.join(map(repr, unknown))}; "
                f"known are {', '.join(sorted(known))}",
                param=unknown[0],
            )
        return cls(**settings)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def _read_structure(given: Mapping[str, Any]) -> StructuredOutputsParams:
    unknown = sorted(
        {str(name) for name in given} - {f.name for f in fields(StructuredOutputsParams)}
    )
    if unknown:
        raise RequestError(
            f"structured_outputs has unknown {', '.join(unknown)}; known are "
            f"{', '.join(f.name for f in fields(StructuredOutputsParams))}",
            param="structured_outputs",
        )
    return StructuredOutputsParams(**given)


@dataclass(frozen=True, slots=True)
class _Range:
    """The numbers that a field may be."""

    low: float
    high: float
    is_whole: bool = False
    may_be_none: bool = False
    is_open_low: bool = False

    def problem(self, name: str, value: object) -> str | None:
        if value is None:
            return None if self.may_be_none else f"{name} is None; it must be a number"
        if isinstance(value, bool) or not isinstance(value, int if self.is_whole else (int, float)):
            kind = "a whole number" if self.is_whole else "a number"
            return f"{name} is {value!r}; it must be {kind}"
        if (
            math.isnan(value)
            or not self.low <= value <= self.high
            or (self.is_open_low and value == self.low)
        ):
            opening = "(" if self.is_open_low else "["
            return f"{name} is {value}; it must be in {opening}{self.low}, {self.high}]"
        return None


_INF = math.inf
_RANGES = {
    "n": _Range(1, 128, is_whole=True),
    "temperature": _Range(0.0, 1e6),
    "top_p": _Range(0.0, 1.0, is_open_low=True),
    "top_k": _Range(-1, _INF, is_whole=True),
    "min_p": _Range(0.0, 1.0),
    "repetition_penalty": _Range(0.0, 1e6, is_open_low=True),
    "presence_penalty": _Range(-2.0, 2.0),
    "frequency_penalty": _Range(-2.0, 2.0),
    "seed": _Range(-MAX_SEED, MAX_SEED, is_whole=True, may_be_none=True),
    "max_tokens": _Range(1, _INF, is_whole=True, may_be_none=True),
    "min_tokens": _Range(0, _INF, is_whole=True),
    "logprobs": _Range(0, 1000, is_whole=True, may_be_none=True),
    "prompt_logprobs": _Range(0, 1000, is_whole=True, may_be_none=True),
    "truncate_prompt_tokens": _Range(1, _INF, is_whole=True, may_be_none=True),
    "priority": _Range(-(2**31), 2**31, is_whole=True),
}


def _problems(params: SamplingParams) -> Iterator[tuple[str, str]]:
    for name, allowed in _RANGES.items():
        problem = allowed.problem(name, getattr(params, name))
        if problem:
            yield name, problem
    yield from _list_problems(params)
    yield from _bias_problems(params)
    structure = params.structured_outputs
    if structure is not None and not isinstance(structure, StructuredOutputsParams):
        yield (
            "structured_outputs",
            f"structured_outputs is {type(structure).__name__}; give StructuredOutputsParams",
        )
    if (
        isinstance(params.max_tokens, int)
        and isinstance(params.min_tokens, int)
        and params.min_tokens > params.max_tokens
    ):
        yield "min_tokens", f"min_tokens {params.min_tokens} exceeds max_tokens {params.max_tokens}"


def _list_problems(params: SamplingParams) -> Iterator[tuple[str, str]]:
    for name in ("stop", "bad_words"):
        value = getattr(params, name)
        strings = [value] if isinstance(value, str) else value
        if strings is None:
            continue
        if not _is_sequence_of(strings, str):
            yield name, f"{name} must be a string or a list of strings, not {value!r}"
        elif any(not text for text in strings):
            yield name, f"{name} holds an empty string; leave it out"
    if params.stop and not params.detokenize:
        yield "stop", "stop strings need text; set detokenize=True or use stop_token_ids"
    for name in ("stop_token_ids", "allowed_token_ids"):
        value = getattr(params, name)
        if value is not None and not _is_sequence_of(value, int):
            yield name, f"{name} must be a list of token ids, not {value!r}"
    if params.allowed_token_ids is not None and len(params.allowed_token_ids) == 0:
        yield "allowed_token_ids", "allowed_token_ids is empty; no token could be produced"


def _bias_problems(params: SamplingParams) -> Iterator[tuple[str, str]]:
    if params.logit_bias is None:
        return
    if not isinstance(params.logit_bias, Mapping):
        yield "logit_bias", f"logit_bias must map token ids to numbers, not {params.logit_bias!r}"
        return
    for token_id, bias in params.logit_bias.items():
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not isinstance(token_id, int) or not is_number or math.isnan(bias):
            yield (
                "logit_bias",
                f"logit_bias has {token_id!r}: {bias!r}; ids are ints, biases numbers",
            )


def _is_sequence_of(value: object, kind: type) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
    )
