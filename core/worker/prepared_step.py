"""What the host knows of a step before its tokens, and how it follows from the step before.

Nearly every step of a busy worker goes on with the requests of the step before, one token each.
What that step made then holds for this one, moved on by a token; block tables and slots change now
and then. A model that reads all its weights in each step leaves nothing of the interpreter's in the
caches, so what is not run costs several times what a warm measurement says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quire.core.interface import StepBatch
from quire.core.worker.buckets import Buckets
from quire.core.worker.input_batch import InputBatch
from quire.core.worker.logit_rows import LogitRows, make_logit_rows
from quire.core.worker.prompt_logprobs import make_prompt_rows
from quire.core.worker.request_state import RequestState
from quire.core.worker.sampling_arrays import (
    SamplingArrays,
    add_token_masks,
    make_sampling_arrays,
)
from quire.core.worker.step_arrays import (
    Int64s,
    RowIndex,
    StepArrays,
    StepRows,
    make_step_arrays,
    next_decode_arrays,
)
from quire.core.worker.step_results import StepOutline


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedStep:
    """One step, as the host sees it. Nothing of it is written again, so that steps share parts."""

    step: StepRows
    arrays: StepArrays
    logits: LogitRows
    outline: StepOutline
    may_replay: bool
    """A decode step, padded so that a recording of it can be replayed."""
    sampled_rows: RowIndex
    """The requests that sample, in the batch's columns."""
    sampled_states: Sequence[RequestState]
    is_pure_decode: bool
    """Each request computes its last token, without guesses, and samples: so may the next step."""


def prepare_step(
    batch: StepBatch,
    requests: InputBatch,
    buckets: Buckets,
    step: StepRows,
    *,
    may_replay: bool = False,
    pads_logits: bool = False,
) -> PreparedStep:
    """Makes all of a step anew. `step` is what `requests.scheduled` says of the batch.

    The arrays are padded to `buckets`; with `pads_logits` sampled rows are as many as requests.
    """
    arrays = make_step_arrays(
        step,
        requests.block_tables,
        requests.block_sizes,
        buckets,
        requests.source_groups,
        requests.num_source_tokens(step.rows) if requests.source_groups else None,
    )
    sampled = np.flatnonzero(batch.samples)
    logits = make_logit_rows(batch, sampled, arrays.last_tokens)
    num_logits = len(logits.requests)
    if num_logits and pads_logits:
        num_logits = max(num_logits, arrays.num_requests)
    sampling = _sampling(batch, requests, step, logits, num_logits)
    states = requests.states(step.rows)
    prompt = make_prompt_rows(requests, step, arrays.last_tokens)
    return PreparedStep(
        step=step,
        arrays=arrays,
        logits=logits,
        outline=StepOutline(
            batch=batch,
            states=states,
            sampled=logits.requests.tolist(),
            sampling=sampling,
            prompt=prompt,
        ),
        may_replay=may_replay,
        sampled_rows=_as_index(step.rows[sampled]),
        sampled_states=[states[index] for index in sampled.tolist()],
        is_pure_decode=(
            arrays.max_query_len == 1
            and len(sampled) == len(states)
            and prompt is None
            and not (batch.draft_token_ids or batch.token_masks)
        ),
    )


def continued_step(
    last: PreparedStep, batch: StepBatch, requests: InputBatch
) -> PreparedStep | None:
    """The step after `last`, if it only goes on with the same requests; None: make it anew.

    What `prepare_step` would make, in fewer operations. `last` was submitted and not taken back.
    """
    if not (last.is_pure_decode and _goes_on(last.outline.batch, batch)):
        return None
    step = StepRows(
        rows=last.step.rows, num_computed=last.step.num_computed + 1, num_new=last.step.num_new
    )
    arrays = next_decode_arrays(
        last.arrays,
        step,
        requests.block_tables,
        requests.block_sizes,
        requests.source_groups,
        computed=batch.num_computed_tokens,
        has_new_blocks=any(batch.new_block_ids),
    )
    sampling = last.outline.sampling
    if not sampling.is_always_same:
        sampling = make_sampling_arrays(requests, step.rows, sampling.num_rows)
    return PreparedStep(
        step=step,
        arrays=arrays,
        logits=last.logits,
        outline=StepOutline(
            batch=batch,
            states=last.outline.states,
            sampled=last.outline.sampled,
            sampling=sampling,
            prompt=None,
        ),
        may_replay=last.may_replay,
        sampled_rows=last.sampled_rows,
        sampled_states=last.sampled_states,
        is_pure_decode=True,
    )


def _goes_on(before: StepBatch, batch: StepBatch) -> bool:
    """Whether a step computes the one token that each request of a pure decode step sampled."""
    return (
        batch.request_ids == before.request_ids
        and batch.num_computed_tokens == [number + 1 for number in before.num_computed_tokens]
        and batch.num_new_tokens == before.num_new_tokens
        and batch.samples == before.samples
        and not (batch.new_requests or batch.draft_token_ids or batch.token_masks)
    )


def _sampling(
    batch: StepBatch, requests: InputBatch, step: StepRows, logits: LogitRows, num_logits: int
) -> SamplingArrays:
    sampling = make_sampling_arrays(requests, step.rows[logits.requests], num_logits, logits.places)
    if batch.token_masks:
        names = [batch.request_ids[index] for index in logits.requests]
        add_token_masks(sampling, names, batch.token_masks)
    return sampling


def _as_index(rows: Int64s) -> RowIndex:
    """A slice where rows follow each other, which numpy reads and writes in a fraction."""
    num_rows = len(rows)
    if num_rows and np.array_equal(rows, np.arange(rows[0], rows[0] + num_rows)):
        return slice(int(rows[0]), int(rows[0]) + num_rows)
    return rows
