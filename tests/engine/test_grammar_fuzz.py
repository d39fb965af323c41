"""Whatever is given as a grammar, it is compiled or refused with the reason, before it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

import quire
from quire.core.errors import RequestError
from quire.core.structured.byte_table import byte_letters, byte_tokenizer
from quire.core.structured.compiler import GrammarChecker, GrammarCompiler, GrammarLimits
from quire.core.structured.spec import GrammarSpec

TOKENIZER = Path(quire.__file__).parent / "demo" / "tokenizer.json"
VOCAB_SIZE = 4096
KINDS = ["grammar", "regex", "json_schema", "structural_tag", "choice"]
LIMITS = GrammarLimits(max_grammar_size=5000, initial_lexer_fuel=200_000)


def special_tokens() -> dict[int, str]:
    known = Tokenizer.from_str(TOKENIZER.read_text()).get_added_tokens_decoder()
    return {number: token.content for number, token in known.items()}


@pytest.fixture(scope="module")
def both():
    """What the front asks and what the engine core compiles."""
    checker = GrammarChecker(special_tokens, vocab_size=VOCAB_SIZE, limits=LIMITS)
    compiler = GrammarCompiler(TOKENIZER.read_text, vocab_size=VOCAB_SIZE, limits=LIMITS)
    yield checker, compiler
    checker.close()
    compiler.close()


def refusal(compiler: GrammarCompiler, spec: GrammarSpec) -> str | None:
    try:
        compiler.compile(spec)
    except RequestError as error:
        return str(error)
    return None


PIECES = [
    *(
        "start: ",
        "root ::= ",
        "\nA: ",
        "B",
        '"a"',
        "/[a-z]+/",
        "/(/",
        " | ",
        "(",
        ")",
        "*",
        "{2,3}",
    ),
    *("%llguidance {}", "%json {", "%regex {", "%ignore /x/", "%import", "[lazy]", "[stop=", "]"),
    *(
        "<|im_end|>",
        "<s>",
        "<[3]>",
        "<[99999999]>",
        "<[^1-9]>",
        "<nope>",
        "~",
        "\\",
        "//",
        "$",
        "^",
    ),
    *("\x00", "é", "(?=a)", "[^", "\\d", "{0,9999}", "a", "\n", "start", ":", "@grammar"),
]
PARTS = ["type", "object", "array", "properties", "$ref", "#", "#/$defs/a", "$defs", "pattern", "("]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**30) | st.sampled_from(PARTS) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(PARTS), inner, max_size=4)
    ),
    max_leaves=12,
)
TAGS = st.builds(
    lambda begin, end, schema, triggers: {
        "structures": [{"begin": begin, "end": end, "schema": schema}],
        "triggers": triggers,
    },
    st.text(max_size=4), st.text(max_size=4) | st.none(), JSON, st.lists(st.text(max_size=2)),
)  # fmt: skip
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.text(max_size=40),
    JSON.map(json.dumps),
    TAGS.map(json.dumps),
)


@settings(max_examples=250, deadline=None)
@given(kind=st.sampled_from(KINDS), text=TEXTS)
@example(kind="grammar", text='start: "a" <nope>')
@example(kind="grammar", text="start: <[4096]>")
@example(kind="regex", text="a\n/b")
def test_grammar_of_any_text_is_compiled_or_refused_by_both_sides_alike(both, kind, text):
    """What the front lets in, the engine core can compile; nothing but a refusal is raised."""
    checker, compiler = both
    spec = GrammarSpec(kind=kind, text=text)
    refused = refusal(checker, spec)
    if refused is None:
        assert refusal(compiler, spec) is None
    assert refusal(checker, GrammarSpec(kind="regex", text="[ab]")) is None


def test_grammar_with_an_unknown_special_token_is_refused_by_its_name(both):
    """The author reads which token the model does not have, and where it stands."""
    for one in both:
        reason = refusal(one, GrammarSpec(kind="grammar", text='start: "a" <|nope|>'))
        assert reason is not None
        assert 'unknown special token: "<|nope|>"' in reason


def test_grammar_with_a_token_of_the_model_is_taken(both):
    """The tokens that the model does have may be named, by text and by number."""
    name = next(text for text in special_tokens().values() if text.startswith("<"))
    for grammar in (f'start: "a" {name}', 'start: "a" <[4095]>'):
        for one in both:
            assert refusal(one, GrammarSpec(kind="grammar", text=grammar)) is None


def test_byte_tokenizer_has_bytes_and_the_named_tokens():
    """Its letters are the library's own, and special tokens stand at their own ids."""
    assert sorted(byte_letters()) == sorted(ByteLevel.alphabet())
    table = byte_tokenizer({0: "<s>", 7000: "<tool>"})
    tokenizer = Tokenizer.from_str(table.text)
    assert tokenizer.token_to_id("<tool>") == 7000
    assert table.size == 7001
    assert tokenizer.decode(tokenizer.encode("né<tool>").ids, skip_special_tokens=False) == (
        "né<tool>"
    )


class Panic(BaseException):
    """As the library's own, which is no Exception."""


class PanickingChecker(GrammarChecker):
    """A library that panics."""

    def _make_table(self, llguidance):
        raise Panic("it went wrong")


def test_panic_of_the_library_is_a_refusal():
    """A panic is no Exception in Python, and would end whoever waits for the grammar."""
    checker = PanickingChecker(dict, vocab_size=VOCAB_SIZE)
    reason = refusal(checker, GrammarSpec(kind="regex", text="a"))
    checker.close()
    assert reason is not None
    assert "it went wrong" in reason
