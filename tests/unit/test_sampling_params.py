"""Sampling parameters refuse what cannot be, all of it at once."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.core.errors import RequestError
from quire.core.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 1.5),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", None),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("logprobs", -1),
        ("seed", "x"),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop_token_ids", ["a"]),
        ("allowed_token_ids", []),
        ("bad_words", 7),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", [1]),
    ],
)
def test_sampling_params_out_of_range_names_the_field(name: str, value: object) -> None:
    """The message and `param` say which field it was."""
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name
    assert name in str(caught.value)


def test_sampling_params_with_several_problems_names_all() -> None:
    """Nobody mends one mistake a round."""
    with pytest.raises(RequestError) as caught:
        SamplingParams(temperature=-1, top_p=2, min_tokens=20, max_tokens=10)
    assert all(name in str(caught.value) for name in ("temperature", "top_p", "min_tokens"))


def test_from_user_with_an_unknown_field_names_it() -> None:
    """A misspelt field must never be ignored."""
    with pytest.raises(RequestError, match="'temprature'") as caught:
        SamplingParams.from_user(temprature=1)
    assert caught.value.param == "temprature"


def test_stop_strings_need_text() -> None:
    """Without detokenization nobody would ever see a stop string."""
    with pytest.raises(RequestError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


@given(
    temperature=st.floats(0, 1e5),
    top_p=st.floats(0.001, 1.0),
    top_k=st.integers(-1, 10**6),
    max_tokens=st.none() | st.integers(1, 10**6),
    stop=st.none() | st.text(min_size=1) | st.lists(st.text(min_size=1)),
)
def test_sampling_params_in_range_are_accepted(
    temperature: float,
    top_p: float,
    top_k: int,
    max_tokens: int | None,
    stop: str | list[str] | None,
) -> None:
    """Everything that the API allows is taken, and `stop` becomes a tuple."""
    params = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, stop=stop
    )
    assert isinstance(params.stop_strings, tuple)
