"""What a step's result means for one request."""

from __future__ import annotations

from quire.core.interface.worker import PositionLogprobs, StepResult
from quire.core.scheduler.request import FinishReason, Request, RequestUpdate


def progress(
    request: Request, tokens: list[int], logprobs: list[PositionLogprobs] | None = None
) -> RequestUpdate:
    """The update of a request that goes on."""
    return RequestUpdate(
        request.request_id,
        tokens,
        None,
        None,
        request.num_cached_tokens,
        request.num_preemptions,
        request.first_scheduled_time_s,
        logprobs,
    )


def end_at(request: Request, token: int) -> tuple[FinishReason | None, int | None]:
    """Whether the last token ends the request, and its id if it is a stop token of the user."""
    num_tokens = len(request.token_ids)
    if token in request.end_token_ids and num_tokens >= request.min_total_tokens:
        return FinishReason.STOP, None if token in request.eos_token_ids else token
    if num_tokens >= request.max_total_tokens:
        return FinishReason.LENGTH, None
    return None, None


def new_prompt_logprobs(
    request: Request, num_computed: int, result: StepResult
) -> list[PositionLogprobs] | None:
    """Those that did not go out before the request was preempted and computed again."""
    entries = result.prompt_logprobs.get(request.request_id)
    if not entries:
        return None
    fresh = entries[max(0, request.num_prompt_logprobs - num_computed) :]
    request.num_prompt_logprobs += len(fresh)
    return fresh or None
