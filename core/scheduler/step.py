"""One step of work: while it is put together, and while it is in flight."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.core.interface.worker import NewRequest, StepBatch
from quire.core.scheduler.request import Request


@dataclass(slots=True, kw_only=True)
class StepDraft:
    """The columns of a step that is being put together."""

    budget: int
    """Tokens that still fit."""
    new_requests: list[NewRequest] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    request_ids: list[str] = field(default_factory=list)
    num_new_tokens: list[int] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    new_block_ids: list[list[list[int]] | None] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    guesses: dict[str, list[int]] = field(default_factory=dict)
    is_short_of_blocks: bool = False
    """Somebody who runs found too few: nobody is admitted."""
    is_waiting_for_blocks: bool = False
    """A step in flight will bring some: nobody takes more before the one who found too few."""

    def add(self, request: Request, num_new: int, blocks: list[list[int]] | None) -> None:
        """Puts the request's next `num_new` tokens into the step, and counts on what it samples."""
        computed, total = request.num_computed_tokens, request.num_tokens
        end = computed + num_new
        self.requests.append(request)
        self.request_ids.append(request.request_id)
        self.num_new_tokens.append(num_new)
        self.num_computed_tokens.append(computed)
        self.new_block_ids.append(blocks)
        self.samples.append(end == total)
        self.budget -= num_new
        if end == total:
            request.num_tokens = total + 1
        request.num_computed_tokens = end
        request.num_in_flight += 1

    def add_blocks(self, blocks: list[list[int]]) -> None:
        """More blocks for the request that was added last."""
        had = self.new_block_ids[-1] or [[] for _ in blocks]
        self.new_block_ids[-1] = [[*a, *b] for a, b in zip(had, blocks, strict=True)]

    def guess(self, request: Request, tokens: list[int]) -> None:
        """Lets the request that was added last be computed beyond its last token, by guesses."""
        self.guesses[request.request_id] = tokens
        self.num_new_tokens[-1] += len(tokens)
        self.budget -= len(tokens)

    def batch(self, step_id: int, finished_request_ids: list[str]) -> StepBatch:
        """The record that goes to the worker."""
        return StepBatch(
            step_id=step_id,
            finished_request_ids=finished_request_ids,
            new_requests=self.new_requests,
            request_ids=self.request_ids,
            num_new_tokens=self.num_new_tokens,
            num_computed_tokens=self.num_computed_tokens,
            new_block_ids=self.new_block_ids,
            samples=self.samples,
            draft_token_ids=self.guesses,
        )


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step whose result is awaited. An id may be taken anew meanwhile, a `Request` may not."""

    batch: StepBatch
    requests: list[Request]
