"""Steps are padded to shapes that the device named, and the padding has owners."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.core.errors import UnsupportedError
from quire.core.interface import Capabilities
from quire.core.worker.buckets import Buckets, StepShape

TOKENS = (1, 4, 16, 64)
REQUESTS = (1, 2, 8)
LENGTHS = st.lists(st.integers(1, 8), min_size=1, max_size=8)


@given(LENGTHS, st.booleans(), st.booleans())
def test_pad_any_step_fits_a_bucket_and_keeps_the_real_tokens(lengths, with_tokens, with_requests):
    """Real requests keep their tokens, but for the last one, which may get more behind them."""
    tokens, requests = TOKENS * with_tokens, REQUESTS * with_requests
    padded = Buckets(tokens, requests).pad(np.array(lengths))
    assert padded[: len(lengths) - 1].tolist() == lengths[:-1]
    assert padded[len(lengths) - 1] >= lengths[-1]
    assert len(padded) in (requests or (len(lengths),))
    if tokens:
        assert padded.sum() in tokens
    extra = len(padded) - len(lengths)
    if extra and (not tokens or padded.sum() < tokens[-1]):
        assert padded[len(lengths) :].min() == 1 or padded[-1] > 1
        assert padded[len(lengths) :].all(), "a padding request without a token"
    if extra:
        assert padded[len(lengths) - 1] == lengths[-1], "padding behind a real request for nothing"


def test_shape_without_buckets_is_the_step_itself():
    """Devices that take any shape are not padded."""
    buckets = Buckets()
    assert not buckets.are_any
    assert buckets.shape(13, 3) == StepShape(13, 3)


def test_shape_with_full_tokens_leaves_padding_requests_without():
    """The largest bucket of tokens is enough even if requests are padded too."""
    assert Buckets((4, 8), (4,)).pad(np.array([5, 3])).tolist() == [5, 3, 0, 0]


def test_of_buckets_below_the_largest_step_are_refused_with_all_reasons():
    """A step that fits no bucket is found at the start and not in the middle of a run."""
    claims = Capabilities(token_buckets=(1, 8), request_buckets=(2,))
    with pytest.raises(UnsupportedError) as caught:
        Buckets.of(claims, max_tokens=9, max_requests=3)
    codes = [reason.code for reason in caught.value.reasons]
    assert codes == ["worker.token_buckets", "worker.request_buckets"]


def test_request_sizes_are_the_buckets_that_steps_reach():
    """What is compiled ahead is what steps need."""
    assert Buckets((), (2, 4, 8)).request_sizes(5) == (2, 4, 8)
    assert Buckets().request_sizes(3) == (1, 2, 3)
