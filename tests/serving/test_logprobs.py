"""Log-probabilities in the shapes of the API."""

from __future__ import annotations

import math

from quire.core.outputs import Logprob
from quire.core.serving.logprobs import (
    TokenNames,
    chat_logprobs,
    completion_logprobs,
    finite,
    prompt_logprobs_body,
)

NAMES = TokenNames(as_ids=False)


def test_finite_keeps_numbers_and_replaces_infinity():
    """Only what JSON cannot say is replaced."""
    assert finite(-3.25) == -3.25
    assert finite(-math.inf) == finite(math.nan) == -9999.0


def test_top_logprobs_of_tokens_that_read_the_same_tell_the_likelier():
    """A dict by text has one entry for two tokens; it is the likelier one's."""
    position = {5: Logprob(-2.0, 2, "a"), 6: Logprob(-1.0, 1, "a"), 7: Logprob(-3.0, 3, "b")}
    columns = completion_logprobs([5], [position], num_top=2, text_offset=0, names=NAMES)
    assert columns.top_logprobs == [{"a": -1.0}]
    assert columns.token_logprobs == [-2.0]


def test_chat_logprobs_rivals_are_exactly_the_likeliest():
    """The chosen token is among the rivals only if it is likely enough."""
    position = {5: Logprob(-9.0, 40, "z"), 6: Logprob(-1.0, 1, "a"), 7: Logprob(-2.0, 2, "b")}
    [entry] = chat_logprobs([5], [position], num_top=2, names=NAMES).content
    assert [rival.token for rival in entry.top_logprobs] == ["a", "b"]
    assert entry.token == "z"


def test_token_without_text_is_named_by_its_id():
    """Where there is no tokenizer the id stands for the text."""
    columns = completion_logprobs(
        [5], [{5: Logprob(-1.0, 1, None)}], num_top=0, text_offset=0, names=NAMES
    )
    assert columns.tokens == ["token_id:5"]


def test_prompt_logprobs_body_keeps_everything():
    """By token id as text: number, rank and what it reads."""
    body = prompt_logprobs_body([None, {5: Logprob(-math.inf, 3, "a")}])
    assert body == [None, {"5": {"logprob": -9999.0, "rank": 3, "decoded_token": "a"}}]
