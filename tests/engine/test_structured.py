"""Output that keeps to a form: what grammars allow, and what an engine makes of them."""

from __future__ import annotations

import datetime as dt
import json
import re
import threading
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from engine_fakes import make_fake_core
from engine_fakes import spec as request
from model_fakes import build_sim_core
from msgspec.structs import replace
from tiny_models import make_tiny_model
from tokenizers import Tokenizer

import quire
from quire.benchmarks.structured_schemas import REFUSED, SCHEMAS
from quire.core.engine.llm import LLM
from quire.core.errors import RequestError
from quire.core.interface.worker import StepResult
from quire.core.sampling_params import SamplingParams, StructuredOutputsParams, ThinkingLimit
from quire.core.scheduler.request import FinishReason
from quire.core.structured.compiler import GrammarCompiler, GrammarLimits
from quire.core.structured.spec import (
    ANYTHING,
    MAX_GRAMMAR_CHARS,
    ConstraintSpec,
    GrammarSpec,
    ThinkingSpec,
)
from quire.core.structured.state import GrammarState
from quire.core.structured.thinking import ThinkingState

TOKENIZER = Path(quire.__file__).parent / "demo" / "tokenizer.json"
VOCAB_SIZE = 4096
END_ID, STOP_ID = 1, 6

EBNF = """
root ::= term (op term){0,3}
term ::= [0-9]{1,2} | "(" root ")"
op ::= "+" | "-"
"""
LARK = 'start: NAME "=" VALUE\nNAME: /[a-z]{1,4}/\nVALUE: /[0-9]{1,3}/'
TAG = {
    "structures": [{"begin": "<f=a>", "schema": SCHEMAS["two properties"], "end": "</f>"}],
    "triggers": ["<f="],
}


def _checker() -> jsonschema.FormatChecker:
    checker = jsonschema.FormatChecker(formats=("ipv4", "email", "uuid"))
    checker.checks("date", raises=ValueError)(dt.date.fromisoformat)
    checker.checks("time", raises=ValueError)(dt.time.fromisoformat)
    checker.checks("date-time", raises=ValueError)(dt.datetime.fromisoformat)
    return checker


CHECKER = _checker()


def fits(text: str, schema: dict) -> None:
    """Raises unless a text is JSON of the schema."""
    jsonschema.Draft202012Validator(schema, format_checker=CHECKER).validate(json.loads(text))


@pytest.fixture(scope="module")
def compiler():
    compiler = GrammarCompiler(TOKENIZER.read_text, vocab_size=VOCAB_SIZE)
    yield compiler
    compiler.close()


def json_grammar(schema: object, **options) -> GrammarSpec:
    return GrammarSpec(kind="json_schema", text=json.dumps(schema), **options)


def allowed(state: GrammarState) -> set[int]:
    mask = state.mask()
    if mask is None:
        return set(range(VOCAB_SIZE))
    assert len(mask) == 4 * -(-VOCAB_SIZE // 32)
    return set(np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")))


def walk(compiler: GrammarCompiler, grammar: GrammarSpec, seed: int, limit: int = 600) -> str:
    """A text that keeps to a grammar, of tokens drawn alike from all that are allowed."""
    compiled = compiler.compile(grammar)
    state = GrammarState(compiled, vocab_size=VOCAB_SIZE, end_token_ids=[END_ID])
    rng = np.random.default_rng(seed)
    token_ids: list[int] = []
    while not state.is_complete and len(token_ids) < limit:
        token = int(rng.choice(sorted(allowed(state))))
        if token == END_ID:
            break
        token_ids.append(token)
        state.accept([token])
        assert state.error is None, (state.error, token_ids)
    assert len(token_ids) < limit
    return compiled.tokenizer.decode_bytes(token_ids).decode()


# ------------------------------------------------------------------------------------- grammars


@pytest.mark.parametrize("name", SCHEMAS)
def test_walk_through_a_schema_gives_what_fits_it(compiler, name):
    """Whatever is drawn among the tokens that a schema allows, it fits the schema."""
    for seed in range(6):
        fits(walk(compiler, json_grammar(SCHEMAS[name]), seed), SCHEMAS[name])


@pytest.mark.parametrize("name", REFUSED)
def test_schema_that_cannot_be_held_is_refused_with_the_reason(compiler, name):
    """Nothing is approximated in silence."""
    with pytest.raises(RequestError, match=r"\w") as caught:
        compiler.compile(json_grammar(REFUSED[name]))
    assert caught.value.param == "structured_outputs.json"


@pytest.mark.parametrize(
    "regex",
    ["[a-z]{3}-[0-9]{2}", "^(yes|no)$", "a{2,5}", "x[^/]y", r"\d{3}/\d{2}", "é|日本", r"\$[1-9]\."],
)
def test_walk_through_an_expression_gives_a_full_match(compiler, regex):
    """The whole output fits, anchored or not."""
    for seed in range(6):
        assert re.fullmatch(regex, walk(compiler, GrammarSpec(kind="regex", text=regex), seed))


def test_walk_through_choices_gives_one_of_them(compiler):
    """One that is the beginning of another may be chosen too."""
    choices = ["yes", "yes, sir", "no", 'say "no"', "né\n"]
    spec = GrammarSpec(kind="choice", text=json.dumps(choices))
    assert {walk(compiler, spec, seed) for seed in range(60)} == set(choices)


def test_walk_through_grammars_gives_what_they_derive(compiler):
    """EBNF as llama.cpp and xgrammar write it, and Lark."""
    for seed in range(8):
        text = walk(compiler, GrammarSpec(kind="grammar", text=EBNF), seed)
        assert re.fullmatch(r"[0-9+()-]+", text)
        assert text.count("(") == text.count(")")
        lark = walk(compiler, GrammarSpec(kind="grammar", text=LARK), seed)
        assert re.fullmatch(r"[a-z]{1,4}=[0-9]{1,3}", lark)


def test_structural_tag_holds_only_behind_its_trigger(compiler):
    """Text is free until a trigger stands in it; from there on a structure must follow."""
    compiled = compiler.compile(GrammarSpec(kind="structural_tag", text=json.dumps(TAG)))
    for before in ("", "Hello, <b> and so on "):
        state = GrammarState(compiled, vocab_size=VOCAB_SIZE, end_token_ids=[END_ID])
        ids = compiled.tokenizer.tokenize_str(before + '<f=a>{"color": "red", "on": true}</f> ok')
        for token in ids:
            assert token in allowed(state)
            state.accept([token])
        assert END_ID in allowed(state)
    state = GrammarState(compiled, vocab_size=VOCAB_SIZE, end_token_ids=[END_ID])
    state.accept(compiled.tokenizer.tokenize_str("<f="))
    assert END_ID not in allowed(state)
    assert len(allowed(state)) < 10


def test_whitespace_is_bounded_and_can_be_turned_off(compiler):
    """A model that likes spaces comes to an end; `disable_any_whitespace` leaves none."""
    schema = SCHEMAS["matrix"]
    for seed in range(10):
        assert "\n\n" not in walk(compiler, json_grammar(schema), seed)
        compact = walk(compiler, json_grammar(schema, disable_any_whitespace=True), seed)
        assert not re.search(r"\s", compact)


def test_additional_properties_can_be_turned_off(compiler):
    """`disable_additional_properties` closes every object that names its properties."""
    schema = {"type": "object", "properties": {"a": SCHEMAS["boolean"]}, "required": ["a"]}
    grammar = json_grammar(schema, disable_additional_properties=True)
    for seed in range(6):
        assert set(json.loads(walk(compiler, grammar, seed))) == {"a"}


def test_options_within_a_schema_do_not_count(compiler):
    """A request cannot make the compiler lenient by a keyword of its library."""
    with pytest.raises(RequestError):
        compiler.compile(json_grammar({"not": {}, "x-guidance": {"lenient": True}}))


# --------------------------------------------------------------------------------------- states


def test_state_allows_ends_only_where_the_grammar_may_end(compiler):
    """The engine's own end tokens, the user's stop tokens, and no other special token."""
    compiled = compiler.compile(GrammarSpec(kind="regex", text="a+"))
    state = GrammarState(compiled, vocab_size=VOCAB_SIZE, end_token_ids=[END_ID, STOP_ID])
    assert not {END_ID, STOP_ID} & allowed(state)
    (a,) = compiled.tokenizer.tokenize_str("a")
    state.accept([a])
    assert {END_ID, STOP_ID} <= allowed(state)
    endless = GrammarState(compiled, vocab_size=VOCAB_SIZE, end_token_ids=())
    endless.accept([a])
    assert all(
        compiled.tokenizer.decode_str([token]).strip("a") == "" for token in allowed(endless)
    )


def test_state_lets_everything_pass_until_its_mark(compiler):
    """With `starts_after` the model thinks freely first, whatever token carries the mark."""
    compiled = compiler.compile(GrammarSpec(kind="choice", text='["yes"]'))
    state = GrammarState(
        compiled, vocab_size=VOCAB_SIZE, end_token_ids=[END_ID], starts_after="</think>"
    )
    state.accept(compiled.tokenizer.tokenize_str("so {many} thoughts </thin"))
    assert state.mask() is None
    state.accept(compiled.tokenizer.tokenize_str("k>"))
    assert END_ID not in allowed(state)
    state.accept(compiled.tokenizer.tokenize_str("yes"))
    assert state.is_complete


def thinking(compiled, text: str | None, max_tokens: int) -> ThinkingState:
    end = tuple(compiled.tokenizer.tokenize_str("</think>"))
    spec = ThinkingSpec(begin=text, end="</think>", end_token_ids=end, max_tokens=max_tokens)
    return ThinkingState(spec, compiled.tokenizer, vocab_size=VOCAB_SIZE)


def follow(state, token_ids: list[int]) -> list[int]:
    """What is said when a model would say `token_ids`, each where it may."""
    said = []
    for wish in token_ids:
        may = allowed(state)
        said.append(wish if wish in may else min(may))
        state.accept(said[-1:])
    return said


@pytest.mark.parametrize("max_tokens", [1, 3, 8, 200])
def test_thoughts_that_become_too_long_are_ended(compiler, max_tokens):
    """After so many tokens there is nothing to say but the end; then everything again."""
    compiled = compiler.compile(ANYTHING)
    tokenizer = compiled.tokenizer
    wished = tokenizer.tokenize_str("so {many} thoughts of mine that never come to any end. " * 2)
    end = tokenizer.tokenize_str("</think>")
    said = follow(thinking(compiled, None, max_tokens), wished)
    if max_tokens >= len(wished):
        assert said == wished
    else:
        assert said == [
            *wished[:max_tokens],
            *end,
            *wished[max_tokens + len(end) :],
        ]


def test_thoughts_that_end_by_themselves_are_left_alone(compiler):
    """A model that stops in time is never forced, however long the rest is."""
    compiled = compiler.compile(ANYTHING)
    wished = compiled.tokenizer.tokenize_str("hm.</think>" + "The answer is long. " * 5)
    assert follow(thinking(compiled, None, 12), wished) == wished


def test_thoughts_are_counted_from_the_mark_that_opens_them(compiler):
    """An answer without thoughts has no budget; one with them has it behind their beginning."""
    compiled = compiler.compile(ANYTHING)
    tokenizer = compiled.tokenizer
    plain = tokenizer.tokenize_str("No thoughts here, only a long answer.")
    assert follow(thinking(compiled, "<think>", 2), plain) == plain
    begin, words = (
        tokenizer.tokenize_str("\n<think>"),
        tokenizer.tokenize_str("aaa bbb ccc ddd eee"),
    )
    said = follow(thinking(compiled, "<think>", 2), [*begin, *words])
    forced = [*words[:2], *tokenizer.tokenize_str("</think>")]
    assert said[len(begin) :][: len(forced)] == forced[: len(words)]


def test_grammar_begins_behind_thoughts_that_were_ended(compiler):
    """A form of output holds behind a forced end as behind the model's own."""
    compiled = compiler.compile(GrammarSpec(kind="choice", text='["yes"]'))
    state = GrammarState(
        compiled,
        vocab_size=VOCAB_SIZE,
        end_token_ids=[END_ID],
        starts_after="</think>",
        thinking=thinking(compiled, None, 3),
    )
    tokenizer = compiled.tokenizer
    follow(state, [*tokenizer.tokenize_str("abcdefgh")[:3], *tokenizer.tokenize_str("</think>")])
    assert not state.is_waiting
    state.accept(tokenizer.tokenize_str("yes"))
    assert state.is_complete


def test_state_token_that_does_not_fit_leaves_nothing_to_choose(compiler):
    """A worker that ignores masks gets an error, not text that pretends to fit."""
    compiled = compiler.compile(GrammarSpec(kind="choice", text='["yes"]'))
    state = GrammarState(compiled, vocab_size=VOCAB_SIZE, end_token_ids=[END_ID])
    state.accept(compiled.tokenizer.tokenize_str("no"))
    assert "does not fit" in state.error
    assert allowed(state) == set()


# ------------------------------------------------------------------------------------- compiler


def test_compile_equal_grammars_is_done_once(compiler):
    """Requests that ask for the same form share the work."""
    first = compiler.submit(json_grammar({"type": "integer", "maximum": 7}))
    assert compiler.submit(json_grammar({"type": "integer", "maximum": 7})) is first


def test_compile_too_large_or_empty_is_refused(compiler):
    """Limits hold before anything is read, and a grammar of nothing is none."""
    huge = GrammarSpec(kind="regex", text="a" * (MAX_GRAMMAR_CHARS + 1))
    for grammar in (
        huge,
        GrammarSpec(kind="regex", text="^$"),
        GrammarSpec(kind="choice", text="[]"),
    ):
        with pytest.raises(RequestError):
            compiler.compile(grammar)


def test_compile_that_takes_too_long_is_refused():
    """A request does not wait for ever for its grammar."""
    release = threading.Event()

    def read() -> str:
        release.wait(60)
        return TOKENIZER.read_text()

    compiler = GrammarCompiler(
        read, vocab_size=VOCAB_SIZE, limits=GrammarLimits(compile_time_s=0.01)
    )
    try:
        with pytest.raises(RequestError, match=r"longer than 0\.01 s"):
            compiler.compile(GrammarSpec(kind="regex", text="a"))
    finally:
        release.set()
        compiler.close()


# ----------------------------------------------------------------------------------- the engine


def test_request_whose_grammar_is_not_ready_holds_nobody_up():
    """Others come and go while it waits; it can be aborted, and gives up at its limit."""
    release = threading.Event()

    def read() -> str:
        release.wait(60)
        raise RequestError("no tokenizer")

    core = make_fake_core()
    core._constraints._compiler = GrammarCompiler(read, vocab_size=VOCAB_SIZE)
    constraint = ConstraintSpec(grammar=GrammarSpec(kind="regex", text="a"))
    for name in ("slow", "aborted"):
        core.add(replace(request(name, [5, 6], max_tokens=3), constraint=constraint))
    core.add(request("fast", [5, 6, 7], max_tokens=4))
    ends = {}
    while "fast" not in ends:
        ends |= {u.request_id: u for u in core.step() if u.finish_reason is not None}
    assert set(ends) == {"fast"}
    assert core.statistics().num_waiting == 2
    assert [u.finish_reason for u in core.abort(["aborted"])] == [FinishReason.ABORT]
    release.set()
    while core.has_work():
        ends |= {u.request_id: u for u in core.step() if u.finish_reason is not None}
    assert ends["slow"].finish_reason is FinishReason.ERROR
    assert "no tokenizer" in ends["slow"].error
    core.close()


def test_constrained_request_is_not_run_ahead_while_others_are():
    """The next mask needs the last token; whoever has no grammar does not wait for it."""
    core = make_fake_core(overlap_scheduling=True)
    constraint = ConstraintSpec(grammar=GrammarSpec(kind="regex", text="a"))
    core.scheduler.add(replace(request("bound", [5, 6], max_tokens=5), constraint=constraint))
    core.scheduler.add(request("free", [5, 6, 7], max_tokens=5))
    first, second = core.scheduler.schedule(), core.scheduler.schedule()
    assert set(first.request_ids) == {"bound", "free"}
    assert second.request_ids == ["free"]
    core.scheduler.update(first, StepResult(step_id=first.step_id, sampled_token_ids=[[7], [7]]))
    assert set(core.scheduler.schedule().request_ids) == {"bound", "free"}
    core.close()


def structured(schema: dict, **settings) -> SamplingParams:
    given = {"max_tokens": 400, **settings}
    return SamplingParams(structured_outputs=StructuredOutputsParams(json=schema), **given)


def check_all(outputs, schemas) -> int:
    """Every output that came to its end fits; returns how many did."""
    num_whole = 0
    for output, schema in zip(outputs, schemas, strict=True):
        for child in output.outputs:
            assert output.error is None
            assert child.finish_reason in ("stop", "length")
            if child.finish_reason == "stop":
                fits(child.text, schema)
                num_whole += 1
    return num_whole


@pytest.fixture(scope="module")
def demo():
    with LLM("demo", cache_memory_bytes=64 << 20) as llm:
        yield llm


def test_thinking_limit_holds_for_every_output_of_the_engine(demo):
    """Thoughts end within their budget and a form follows them, also for n > 1."""
    limit = ThinkingLimit(end="</think>", max_tokens=6)
    form = StructuredOutputsParams(choice=["yes", "no"], starts_after="</think>")
    end = Tokenizer.from_file(str(TOKENIZER)).encode("</think>", add_special_tokens=False).ids
    for given in (None, form):
        params = SamplingParams(
            n=2, max_tokens=60, seed=3, ignore_eos=given is None,
            thinking_limit=limit, structured_outputs=given,
        )  # fmt: skip
        for output in demo.generate(["Hello there", "A"], params):
            for one in output.outputs:
                _, _, answer = one.text.partition("</think>")
                assert one.token_ids[6 : 6 + len(end)] == end
                assert answer in ("yes", "no") if given else len(one.token_ids) == 60


def test_thinking_limit_that_is_none_is_refused():
    """A budget that cannot be held is said at once."""
    for settings in ({"max_tokens": 0}, {"max_tokens": 3, "begin": ""}, {"max_tokens": True}):
        with pytest.raises(RequestError, match="thinking_limit"):
            ThinkingLimit(end="</think>", **settings)


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_demo_model_gives_what_fits_every_schema(demo, temperature):
    """Greedy and very hot, all schemas in one batch, two outputs each."""
    params = [
        structured(schema, temperature=temperature, n=2 if temperature else 1, seed=index)
        for index, schema in enumerate(SCHEMAS.values())
    ]
    outputs = demo.generate(["Answer: "] * len(params), params, use_tqdm=False)
    num_whole = check_all(outputs, SCHEMAS.values())
    assert num_whole >= 0.9 * sum(p.n for p in params)


def test_random_model_gives_what_fits_every_schema(tmp_path):
    """A model that knows nothing is held just the same; its tokens are another vocabulary's."""
    model = make_tiny_model("llama", tmp_path)
    params = [structured(s, temperature=1.0, seed=3, max_tokens=200) for s in SCHEMAS.values()]
    with LLM(str(model), cache_memory_bytes=8 << 20) as llm:
        outputs = llm.generate(["x"] * len(params), params, use_tqdm=False)
    assert check_all(outputs, SCHEMAS.values()) >= 0.8 * len(params)


def test_output_is_the_same_however_it_is_scheduled(tmp_path):
    """Chunked prefill, preemption, prefix hits and an asynchronous device change no token."""
    model = str(make_tiny_model("llama", tmp_path))
    schemas = [SCHEMAS[name] for name in ("invoice", "many properties", "array of objects", "move")]
    params = [structured(s, temperature=1.0, seed=9, n=2, max_tokens=120) for s in schemas]
    params.append(SamplingParams(max_tokens=40, temperature=1.0, seed=1))
    prompts = ["one two three four five six seven " * 3] * len(params)

    def texts(**settings) -> list[list[str]]:
        with LLM(model, **settings) as llm:
            twice = [llm.generate(prompts, params, use_tqdm=False) for _ in range(2)]
            assert check_all(twice[0][:-1], schemas) > 0
            found = [[[c.text for c in o.outputs] for o in outputs] for outputs in twice]
            assert found[0] == found[1]
            return found[0], llm.statistics().num_preemptions

    plain, _ = texts(cache_memory_bytes=8 << 20)
    chunked, _ = texts(cache_memory_bytes=8 << 20, max_num_batched_tokens=16, max_num_seqs=4)
    tight, num_preemptions = texts(cache_memory_bytes=240 << 10, block_size=16, max_model_len=400)
    ahead, _ = texts(cache_memory_bytes=8 << 20, build_core=build_sim_core)
    assert num_preemptions > 0
    assert plain == chunked == tight == ahead


def test_output_that_is_whole_ends_with_or_without_end_tokens(demo):
    """`ignore_eos` and `min_tokens` prolong nothing that the grammar has closed."""
    regex = StructuredOutputsParams(regex="[a-c]{4}")
    settings = ({}, {"ignore_eos": True}, {"min_tokens": 30}, {"stop": ["zzz"]}, {"logprobs": 1})
    params = [
        SamplingParams(max_tokens=40, structured_outputs=regex, **setting) for setting in settings
    ]
    for output in demo.generate(["x"] * len(params), params, use_tqdm=False):
        child = output.outputs[0]
        assert re.fullmatch("[a-c]{4}", child.text), child
        assert (child.finish_reason, child.stop_reason) == ("stop", None)


def test_output_cut_by_length_says_so(demo):
    """Where max_tokens ends the output, it is not whole, and does not pretend to be."""
    params = SamplingParams(max_tokens=3, structured_outputs={"regex": "[a-c]{400}"})
    child = demo.generate("x", params, use_tqdm=False)[0].outputs[0]
    assert child.finish_reason == "length"


def test_mask_and_the_users_own_limits_hold_together(demo):
    """`allowed_token_ids` narrows the grammar; a conflict is an error of that request alone."""
    (a,) = demo.get_tokenizer().encode("a", add_special_tokens=False)
    regex = {"regex": "[a-c]{4}"}
    params = [
        SamplingParams(max_tokens=9, structured_outputs=regex, allowed_token_ids=[a]),
        SamplingParams(
            max_tokens=9, structured_outputs={"regex": "[b-c]{4}"}, allowed_token_ids=[a]
        ),
        SamplingParams(
            max_tokens=4, structured_outputs=regex, logit_bias={a: -100.0}, temperature=0
        ),
    ]
    good, bad, biased = demo.generate(["x"] * 3, params, use_tqdm=False)
    assert good.outputs[0].text == "aaaa"
    assert bad.error is not None
    assert "a" not in biased.outputs[0].text


def test_bad_grammar_is_refused_before_anything_runs(demo):
    """The user reads the reason, and the engine goes on."""
    with pytest.raises(RequestError, match="uniqueItems"):
        demo.generate("x", structured(REFUSED["unique items"]))
    with pytest.raises(RequestError, match="give one of"):
        StructuredOutputsParams(json="{}", regex="a")
    with pytest.raises(RequestError, match="schemas"):
        SamplingParams(structured_outputs={"schemas": {}})


def test_table_that_is_being_made_holds_nobody_up_and_is_made_once():
    """Making ready returns at once; a grammar that comes meanwhile waits for the same table."""
    release, reads = threading.Event(), []

    def read() -> str:
        reads.append(1)
        release.wait(60)
        return TOKENIZER.read_text()

    compiler = GrammarCompiler(read, vocab_size=VOCAB_SIZE)
    try:
        ready = compiler.prepare_soon()
        grammar = compiler.submit(GrammarSpec(kind="regex", text="a"))
        assert not ready.done()
        assert not grammar.done()
        release.set()
        assert ready.result(60) is None
        assert grammar.result(60).start() is not None
        assert reads == [1]
    finally:
        release.set()
        compiler.close()
