"""Shapes that a step may have: the next bucket, and who owns the padding.

Where a device names buckets, a step is padded to the next one. Padding requests read and write
NULL_BLOCK alone, and nobody reads their outputs:

    requests   [ real ............ | padding, one token each while they last ]
    tokens     [ real ............ | padding; what is left over belongs to the last request ]

Tokens behind a request's last are after it in time, so causal attention shows them to nobody real,
and they are written where that request's next tokens will be.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.core.errors import Reason, UnsupportedError
from quire.core.interface import Capabilities

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepShape:
    """How many tokens and requests a step has, padding included."""

    num_tokens: int
    num_requests: int


class Buckets:
    """The shapes that one device takes."""

    def __init__(
        self, token_buckets: Sequence[int] = (), request_buckets: Sequence[int] = ()
    ) -> None:
        self._tokens = tuple(token_buckets)
        self._requests = tuple(request_buckets)

    @classmethod
    def of(cls, capabilities: Capabilities, *, max_tokens: int, max_requests: int) -> Buckets:
        """The buckets that a device claims, for steps up to a size.

        Raises: UnsupportedError if the largest bucket is smaller than the largest step.
        """
        claims = (
            ("token_buckets", "max_num_batched_tokens", capabilities.token_buckets, max_tokens),
            ("request_buckets", "max_num_seqs", capabilities.request_buckets, max_requests),
        )
        reasons = [
            Reason(
                code=f"worker.{claim}",
                need=f"steps of {needed} ({setting})",
                have=f"buckets up to {buckets[-1]}",
                remedy=f"set {setting} to at most {buckets[-1]}",
            )
            for claim, setting, buckets, needed in claims
            if buckets and buckets[-1] < needed
        ]
        if reasons:
            raise UnsupportedError(reasons, what="the size of a step")
        return cls(capabilities.token_buckets, capabilities.request_buckets)

    @property
    def are_any(self) -> bool:
        """Whether the device names buckets at all."""
        return bool(self._tokens or self._requests)

    @property
    def pads_requests(self) -> bool:
        """Whether the number of requests is padded."""
        return bool(self._requests)

    def request_sizes(self, limit: int) -> tuple[int, ...]:
        """The numbers of requests that steps of up to `limit` requests are padded to."""
        return tuple(sorted({_next(self._requests, n) for n in range(1, limit + 1)}))

    def shape(self, num_tokens: int, num_requests: int) -> StepShape:
        """The smallest shape that holds a step, and a token for each padding request if it can."""
        padded_requests = _next(self._requests, num_requests)
        wanted = num_tokens + padded_requests - num_requests
        if self._tokens and wanted > self._tokens[-1]:
            wanted = num_tokens
        return StepShape(_next(self._tokens, wanted), padded_requests)

    def pad(self, num_new_tokens: Lengths) -> Lengths:
        """The tokens of each request, padding included.

        A padding request without a token is left only where the largest bucket of tokens is full.
        """
        num_tokens = int(num_new_tokens.sum())
        shape = self.shape(num_tokens, len(num_new_tokens))
        spare_tokens = shape.num_tokens - num_tokens
        spare_requests = shape.num_requests - len(num_new_tokens)
        padded = np.zeros(shape.num_requests, np.int64)
        padded[: len(num_new_tokens)] = num_new_tokens
        owning = min(spare_tokens, spare_requests)
        padded[len(num_new_tokens) : len(num_new_tokens) + owning] = 1
        padded[-1] += spare_tokens - owning
        return padded


def _next(buckets: tuple[int, ...], number: int) -> int:
    return buckets[bisect_left(buckets, number)] if buckets else number
