"""A request: as it arrives at the engine core, and its state while it lives there."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec

from quire.core.interface.worker import (
    Feature,
    PooledNumbers,
    PoolingSpec,
    PositionLogprobs,
    SamplingSpec,
)
from quire.core.kv_cache.block_table import BlockTable
from quire.core.scheduler.guessing import PromptLookup
from quire.core.structured.spec import ConstraintSpec


class RequestSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the front hands it over: validated, tokenized, plain data."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingSpec
    max_tokens: int
    """The most output tokens; prompt and output together fit the context."""
    eos_token_ids: tuple[int, ...] = ()
    """End the output unless the user ignores them."""
    stop_token_ids: tuple[int, ...] = ()
    """Asked for by the user; end the output and are reported as the stop reason."""
    priority: int = 0
    arrival_time_s: float = 0.0
    """`time.monotonic` of the front."""
    cache_salt: str | None = None
    constraint: ConstraintSpec | None = None
    """What the output must look like."""
    pooling: PoolingSpec | None = None
    """Given: the text becomes numbers, and no token is sampled."""
    features: list[Feature] = []
    """What it brings besides tokens."""


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestStatus(enum.Enum):
    """Where a request is in its life."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    """Waiting again, its blocks given back; it goes on from its tokens."""
    FINISHED = enum.auto()


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A request in the engine core. The scheduler owns and writes it.

    There are no phases: a step narrows the gap between `num_computed_tokens` and `num_tokens`. A
    step that reaches the last token samples one more, which counts in `num_tokens` at once, before
    its value is known.
    """

    request_id: str
    token_ids: list[int]
    """The prompt and the output that is known."""
    num_prompt_tokens: int
    max_total_tokens: int
    """Prompt and output together end here."""
    min_total_tokens: int
    """The output may not end before so many."""
    eos_token_ids: frozenset[int]
    end_token_ids: frozenset[int]
    """Those, and the user's own stop tokens."""
    sampling: SamplingSpec
    priority: int
    arrival_index: int
    """Counts up in the order of arrival."""
    table: BlockTable
    features: list[Feature]
    """What it brings besides tokens; handed to the worker whenever it comes as new."""
    pooling: PoolingSpec | None = None
    """Given: the text is computed whole in one step, which brings numbers instead of a token."""
    needs_last_token: bool = False
    """The next step needs the value of the last token, as a grammar does: it is never run ahead."""
    lookup: PromptLookup | None = None
    """Guesses what follows; None: nothing is guessed for it."""
    order_key: tuple[int, ...] = ()
    """The policy's; smaller goes first."""
    status: RequestStatus = RequestStatus.WAITING
    num_tokens: int = 0
    """`token_ids` and the tokens that steps in flight will bring."""
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache when all steps in flight are done."""
    num_in_flight: int = 0
    """Steps in flight that hold the request; its blocks are theirs until they are back."""
    num_stale_steps: int = 0
    """Of those in flight, how many results are to be thrown away."""
    is_known_to_worker: bool = False
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache held when the request was first admitted."""
    num_preemptions: int = 0
    num_prompt_logprobs: int = 0
    """Entries of the prompt's log-probabilities that went out already."""
    first_scheduled_time_s: float | None = None

    @property
    def num_output_tokens(self) -> int:
        """Output tokens that are known."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt are owed, so that all of it must be computed."""
        return (
            self.sampling.num_prompt_logprobs is not None
            and self.num_prompt_logprobs < self.num_prompt_tokens - 1
        )


class RequestUpdate(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What became of one request in one step."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    """None: it goes on."""
    stop_reason: int | None = None
    """The user's stop token that ended it."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache held."""
    num_preemptions: int = 0
    first_scheduled_time_s: float | None = None
    """On the clock of the scheduler, `time.monotonic`; None: it never ran."""
    logprobs: list[PositionLogprobs] | None = None
    """One for each new token, where asked."""
    prompt_logprobs: list[PositionLogprobs] | None = None
    """The next entries, where asked; in the end one for each prompt token but the first."""
    error: str | None = None
    """Why it failed, where `finish_reason` is `ERROR`."""
    is_whole: bool = False
    """It ended since its grammar allows no more: the last token is no stop token, but text."""
    pooled: PooledNumbers | None = None
    """What became of the text of a request that asked for numbers."""
