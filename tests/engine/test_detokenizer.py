"""Text comes out token by token as it would at once."""

from __future__ import annotations

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from text_fakes import byte_fallback_tokenizer, byte_level_tokenizer, word_piece_tokenizer

from quire.core.engine.detokenizer import Detokenizer
from quire.core.engine.tokenizer import TextCodec

KINDS = {
    "byte_level": byte_level_tokenizer,
    "byte_fallback": byte_fallback_tokenizer,
    "word_piece": word_piece_tokenizer,
}


@pytest.fixture(scope="module")
def codecs() -> dict[str, TextCodec]:
    return {name: TextCodec(make()) for name, make in KINDS.items()}


def stream(codec, ids, prompt=(), *, skip=True) -> list[str]:
    detokenizer = Detokenizer(codec, prompt_token_ids=prompt, skip_special_tokens=skip)
    return [*(detokenizer.append(token_id) for token_id in ids), detokenizer.finish()]


def at_once(codec, ids, prompt=(), *, skip=True) -> str:
    """The slow, obvious way: all tokens together, without what the prompt alone is."""
    before = codec.decode(list(prompt), skip_special_tokens=skip)
    return codec.decode([*prompt, *ids], skip_special_tokens=skip)[len(before) :]


def words_of(codec) -> list[int]:
    """All ids but those of single bytes, some without text among them."""
    return [one for one in range(codec.num_known_ids + 3) if one not in codec.byte_values]


def is_whole(codec, ids) -> bool:
    """Whether every run of byte tokens is valid UTF-8: for others decoders throw good characters away."""
    run = bytearray()
    for token_id in [*ids, -1]:
        if token_id in codec.byte_values:
            run.append(codec.byte_values[token_id])
            continue
        try:
            run.decode()
        except UnicodeDecodeError:
            return False
        run.clear()
    return True


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 520), max_size=60), skip=st.booleans())
@example(ids=[0, 1, 2, 3, 519, 42], skip=True)
def test_append_byte_level_any_tokens_equal_decode_at_once(codecs, ids, skip):
    """Whatever bytes the model chooses, also none that are text, nothing is lost or doubled."""
    codec = codecs["byte_level"]
    assert "".join(stream(codec, ids, skip=skip)) == at_once(codec, ids, skip=skip)


@settings(max_examples=150, deadline=None)
@given(
    prompt=st.lists(st.integers(4, 511), max_size=20),
    ids=st.lists(st.integers(0, 511), max_size=30),
)
def test_append_byte_level_after_prompt_equals_rest_of_decode(codecs, prompt, ids):
    """The output continues the prompt's text, wherever the prompt ends."""
    codec = codecs["byte_level"]
    assert "".join(stream(codec, ids, prompt)) == at_once(codec, ids, prompt)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60), cut=st.integers(0, 60))
def test_append_text_never_shows_half_a_character(codecs, text, cut):
    """Of valid text no delta holds the mark for broken bytes, and the text arrives whole."""
    codec = codecs["byte_level"]
    text = text.replace("\ufffd", "")
    ids = codec.encode(text, add_special_tokens=False)
    # What spells a special token is one, and has no text.
    assume(codec.decode(ids, skip_special_tokens=True) == codec.decode(ids))
    deltas = stream(codec, ids)
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip=st.booleans())
@pytest.mark.parametrize("kind", ["byte_fallback", "word_piece"])
def test_append_other_kinds_equal_decode_at_once(codecs, kind, data, skip):
    """Leading spaces, joined words and byte tokens come out as the decoder has them."""
    codec = codecs[kind]
    one = st.integers(0, codec.num_known_ids + 2)
    if codec.byte_values:
        byte_ids = {value: token_id for token_id, value in codec.byte_values.items()}
        characters = st.sampled_from("aé€😀ß中\n ").map(
            lambda character: [byte_ids[value] for value in character.encode()]
        )
        words = st.sampled_from(words_of(codec)).map(lambda token_id: [token_id])
        pieces = data.draw(st.lists(characters | words, max_size=40))
        ids = [token_id for piece in pieces for token_id in piece]
    else:
        ids = data.draw(st.lists(one, max_size=40))
    prompt = data.draw(st.lists(st.sampled_from(words_of(codec)), max_size=12))
    assert is_whole(codec, ids)
    assert "".join(stream(codec, ids, prompt, skip=skip)) == at_once(codec, ids, prompt, skip=skip)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip=st.booleans())
@pytest.mark.parametrize("kind", KINDS)
def test_finish_with_all_tokens_equals_one_by_one(codecs, kind, data, skip):
    """A text that is made at the end is the text that would have been streamed, broken bytes too."""
    codec = codecs[kind]
    one = st.integers(0, codec.num_known_ids + 2)
    prompt, ids = data.draw(st.lists(one, max_size=8)), data.draw(st.lists(one, max_size=30))
    streamed = "".join(stream(codec, ids, prompt, skip=skip))
    detokenizer = Detokenizer(codec, prompt_token_ids=prompt, skip_special_tokens=skip)
    assert detokenizer.finish_with(ids) == streamed


@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip=st.booleans())
@pytest.mark.parametrize("kind", KINDS)
def test_extend_in_any_pieces_equals_one_by_one(codecs, kind, data, skip):
    """Tokens that are handed over together read as they would have one after the other."""
    codec = codecs[kind]
    one = st.integers(0, codec.num_known_ids + 2)
    prompt = data.draw(st.lists(one, max_size=8))
    pieces = data.draw(st.lists(st.lists(one, max_size=8), max_size=12))
    ids = [token_id for piece in pieces for token_id in piece]
    detokenizer = Detokenizer(codec, prompt_token_ids=prompt, skip_special_tokens=skip)
    text = "".join(map(detokenizer.extend, pieces)) + detokenizer.finish()
    assert text == "".join(stream(codec, ids, prompt, skip=skip))


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.integers(0, 255), max_size=24))
def test_append_byte_tokens_equal_utf8_decoding_with_replacement(codecs, values):
    """Bytes that are no character come out as marks in the end; the characters among them survive."""
    codec = codecs["byte_fallback"]
    ids_of = {value: token_id for token_id, value in codec.byte_values.items()}
    word = codec.tokenizer.get_vocab()["quire"]  # a space at the very start would be stripped
    deltas = stream(codec, [ids_of[value] for value in values], [word])
    assert "".join(deltas) == bytes(values).decode("utf-8", "replace")


def test_append_invalid_bytes_come_out_before_the_end(codecs):
    """A model that chooses broken bytes for ever is not silent for ever."""
    codec = codecs["byte_level"]
    (broken,) = (i for i in range(4, 260) if codec.tokenizer.convert_ids_to_tokens(i) == "ÿ")
    deltas = stream(codec, [broken] * 100)
    assert "".join(deltas) == "\ufffd" * 100
    assert len("".join(deltas[:50])) >= 40


def test_append_long_output_decodes_few_tokens_each_time(codecs):
    """The cost of a token does not grow with the output."""
    codec = codecs["byte_level"]
    counting = CountingDecoder(codec)
    ids = codec.encode(
        "The quick brown fox jumps over the lazy dog. é€😀 " * 100, add_special_tokens=False
    )
    assert len(ids) > 2000
    detokenizer = Detokenizer(counting)
    for token_id in ids:
        detokenizer.append(token_id)
    assert counting.num_decoded / len(ids) < 16
    assert counting.longest <= 65


def test_append_special_tokens_are_shown_when_asked(codecs):
    """`skip_special_tokens=False` shows the end of sequence too."""
    codec = codecs["byte_level"]
    assert "".join(stream(codec, [0, 40, 1], skip=False)) == "<|begin|>E<|end|>"
    assert "".join(stream(codec, [0, 40, 1])) == "E"


def test_token_text_is_what_stands_in_the_middle_of_a_text(codecs):
    """Log-probabilities show tokens with their space, so that they can be put together again."""
    codec = codecs["byte_fallback"]
    vocabulary = codec.tokenizer.get_vocab()
    assert codec.token_text(vocabulary["▁quire"]) == " quire"
    assert codec.token_text(vocabulary["quire"]) == "quire"
    assert codec.token_text(vocabulary["</s>"]) == "</s>"
    assert codec.token_text(codec.num_known_ids + 7) == ""


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=80), adds=st.booleans())
def test_encode_equals_transformers(codecs, text, adds):
    """The short way round transformers gives the same ids."""
    for codec in codecs.values():
        expected = codec.tokenizer.encode(text, add_special_tokens=adds)
        assert codec.encode(text, add_special_tokens=adds) == expected
        assert codec.encode_all([text], add_special_tokens=adds) == [expected]


class CountingDecoder:
    """Counts what it is asked to decode."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self.special_ids = codec.special_ids
        self.byte_values = codec.byte_values
        self.num_known_ids = codec.num_known_ids
        self.num_decoded = 0
        self.longest = 0

    def decode(self, token_ids, *, skip_special_tokens):
        self.num_decoded += len(token_ids)
        self.longest = max(self.longest, len(token_ids))
        return self._codec.decode(token_ids, skip_special_tokens=skip_special_tokens)
