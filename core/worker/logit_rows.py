"""Which rows of a step are sampled after: the last token of a request, and each guess."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.core.interface import StepBatch
from quire.core.worker.step_arrays import Int64s


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitRows:
    """R sampled rows; those of one request follow each other."""

    requests: Int64s
    """[R]: whose they are, an index into the batch."""
    flat: Int64s
    """[R]: the token after which to sample, an index into the step's tokens."""
    places: Int64s | None
    """[R]: how many guesses stand before it; None: nobody guesses."""
    is_guessing: npt.NDArray[np.bool_] | bool
    """[R]: whether its request has guesses."""


def make_logit_rows(batch: StepBatch, sampled: Int64s, last_tokens: Int64s) -> LogitRows:
    """`sampled`: the requests that sample; last_tokens [requests]: their last token's index."""
    if not batch.draft_token_ids:
        return LogitRows(
            requests=sampled, flat=last_tokens[sampled], places=None, is_guessing=False
        )
    drafts, names = batch.draft_token_ids, batch.request_ids
    counts = np.array([len(drafts.get(names[index], ())) for index in sampled], np.int64)
    requests = np.repeat(sampled, counts + 1)
    places = np.concatenate([np.arange(count + 1) for count in counts])
    guesses = np.repeat(counts, counts + 1)
    return LogitRows(
        requests=requests,
        flat=last_tokens[requests] - guesses + places,
        places=places,
        is_guessing=guesses > 0,
    )
