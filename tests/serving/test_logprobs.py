"""Log-probabilities in the shapes of the API."""

from __future__ import annotations

import math

import pytest
from tokenizers import pre_tokenizers

from quire.core.outputs import Logprob
from quire.core.serving.answers.logprobs import (
    TokenNames,
    chat_logprobs,
    completion_logprobs,
    finite,
    prompt_logprobs_body,
)
from quire.core.serving.answers.token_bytes import TokenBytes, bytes_of_piece

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
    logprobs = chat_logprobs([5], [position], num_top=2, names=NAMES, token_bytes=TokenBytes(None))
    [entry] = logprobs.content
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


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        ("<0xE4>", b"\xe4"),
        ("hello", b"hello"),
        ("\u0120\u00c3", b" \xc3"),
        ("\u00c2\u00a4", "\u00a4".encode()),
        ("\u2581x", None),
        ("", None),
    ],
)
def test_bytes_of_piece_reads_both_alphabets(piece, expected):
    """Byte-fallback names and byte-level letters are bytes; anything else is left to its text."""
    assert bytes_of_piece(piece) == expected


def test_byte_alphabet_is_that_of_the_tokenizers():
    """All 256 letters of byte-level BPE are known, each once."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    assert sorted(bytes_of_piece(letter) for letter in letters) == [bytes([b]) for b in range(256)]


def test_half_characters_have_their_own_bytes():
    """A token that is half a character tells its bytes, so that a client can join them."""

    class Vocabulary:
        def convert_ids_to_tokens(self, token_id):
            return {7: "\u00f0\u0141"}[token_id]

    token_bytes = TokenBytes(Vocabulary())
    assert bytes(token_bytes.of(7, Logprob(-1.0, 1, "\ufffd"), "x")) == b"\xf0\x9f"
    assert bytes(token_bytes.of(8, Logprob(-1.0, 1, "\u00e9"), "x")) == "\u00e9".encode()
    assert bytes(token_bytes.of(9, Logprob(-1.0, 1, None), "token_id:9")) == b"token_id:9"
