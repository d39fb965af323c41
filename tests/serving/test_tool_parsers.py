"""What models write as tool calls and thoughts, read whole and in every way of cutting it."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.errors import ConfigError
from quire.core.serving.tools.events import (
    AnswerParser,
    CallPart,
    ParsedAnswer,
    join,
    parse_whole,
)
from quire.core.serving.tools.plan import AnswerPlan
from quire.core.serving.tools.registry import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    Formats,
    choose_formats,
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}},
]
OSLO = {"city": "Oslo", "days": 3}
ROME = {"city": 'Ro"m}e</tool_call>', "days": 1}


@dataclass(frozen=True)
class Case:
    format: str
    text: str
    calls: tuple = (("get_weather", OSLO),)
    content: str | None = None
    reasoning: str | None = None
    thoughts: str = ""
    """The reasoning format."""
    prompt: str = ""

    def parser(self) -> AnswerParser:
        formats = Formats(TOOL_FORMATS[self.format], REASONING_FORMATS.get(self.thoughts))
        return AnswerPlan(formats=formats, mode="auto", tools=TOOLS).parser(self.prompt)


def hermes(name: str, arguments: dict) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def deepseek(name: str, arguments: dict) -> str:
    body = f"function<｜tool▁sep｜>{name}\n```json\n{json.dumps(arguments)}\n```"
    return f"<｜tool▁call▁begin｜>{body}<｜tool▁call▁end｜>"


def kimi(name: str, number: int, arguments: dict) -> str:
    head = f"functions.{name}:{number}<|tool_call_argument_begin|>"
    return f"<|tool_call_begin|>{head}{json.dumps(arguments)}<|tool_call_end|>"


def qwen_coder(name: str, arguments: dict) -> str:
    pairs = [f"<parameter={key}>\n{plain(value)}\n</parameter>" for key, value in arguments.items()]
    return "\n".join(["<tool_call>", f"<function={name}>", *pairs, "</function>", "</tool_call>"])


def glm(name: str, arguments: dict) -> str:
    pairs = [
        f"<arg_key>{key}</arg_key>\n<arg_value>{plain(value)}</arg_value>\n"
        for key, value in arguments.items()
    ]
    return f"<tool_call>{name}\n{''.join(pairs)}</tool_call>"


def plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def gemma(name: str, arguments: dict) -> str:
    inner = gemma_value(arguments)
    return f"<start_function_call>call:{name}{inner}<end_function_call>"


def gemma_value(value: object) -> str:
    match value:
        case str():
            return f"<escape>{value}<escape>"
        case dict():
            return f"{{{','.join(f'{key}:{gemma_value(one)}' for key, one in value.items())}}}"
        case list():
            return f"[{','.join(gemma_value(one) for one in value)}]"
    return json.dumps(value)


def llama(name: str, arguments: dict) -> str:
    return json.dumps({"name": name, "parameters": arguments})


TWO = (("get_weather", OSLO), ("now", {}))
CASES = [
    Case("hermes", "Just text.", (), "Just text."),
    Case("hermes", " spaced \n", (), " spaced \n"),
    Case("hermes", hermes("get_weather", OSLO)),
    Case("hermes", f"Let me look.\n\n{hermes('get_weather', OSLO)}", content="Let me look."),
    Case("hermes", f"{hermes('get_weather', OSLO)}\n{hermes('now', {})}\n", TWO),
    Case("hermes", hermes("get_weather", ROME), (("get_weather", ROME),)),
    Case(
        "hermes", f"{hermes('now', {})}\nDone <b>so</b> far ", (("now", {}),), "Done <b>so</b> far "
    ),
    Case("hermes", "<tool_call>\nno json\n</tool_call>", (), "<tool_call>\nno json\n</tool_call>"),
    Case("hermes", '<tool_call>\n{"name": "now"', (), '<tool_call>\n{"name": "now"'),
    Case("hermes", "a < b <tool", (), "a < b <tool"),
    Case(
        "hermes",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        (),
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
    ),
    Case("hermes", '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', (("now", {}),)),
    Case(
        "hermes",
        '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>',
        (),
        '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>',
    ),
    Case(
        "qwen3_coder",
        "Looking.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        content="Looking.",
    ),
    Case("qwen3_coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>", (("now", {}),)),
    Case("qwen3_coder", "<tool_call>oops</tool_call>", (), "<tool_call>oops</tool_call>"),
    Case(
        "glm45",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
    ),
    Case("glm45", "<tool_call>now\n</tool_call>", (("now", {}),)),
    Case(
        "glm45",
        "<think>\nhm</think>\nOk.<tool_call>now</tool_call>",
        (("now", {}),),
        "Ok.",
        "\nhm",
        thoughts="glm45",
    ),
    Case("llama3_json", '{"name": "get_weather", "parameters": {"city": "Oslo", "days": 3}}'),
    Case("llama3_json", '<|python_tag|>{"name": "now", "parameters": {}}', (("now", {}),)),
    Case(
        "llama3_json",
        '{"name": "get_weather", "parameters": {"city": "Oslo", "days": 3}}; '
        '{"name": "now", "parameters": {}}',
        TWO,
    ),
    Case("llama3_json", '{"nam": 1}', (), '{"nam": 1}'),
    Case("llama3_json", '{"name": "x", "age": 3', (), '{"name": "x", "age": 3'),
    Case("llama3_json", "Hello {there}", (), "Hello {there}"),
    Case("llama4_pythonic", '[get_weather(city="Oslo", days=3), now()]', TWO),
    Case("llama4_pythonic", "<|python_start|>[now()]<|python_end|>", (("now", {}),)),
    Case("pythonic", "[1, 2, 3]", (), "[1, 2, 3]"),
    Case("pythonic", "[now(open('x'))]", (), "[now(open('x'))]"),
    Case("pythonic", "[link](http://a.b)", (), "[link](http://a.b)"),
    Case(
        "mistral", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}]'
    ),
    Case(
        "mistral",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo", "days": 3}[TOOL_CALLS]now[ARGS]{}',
        TWO,
    ),
    Case("mistral", "[TOOL_CALLS] sorry", (), "[TOOL_CALLS] sorry"),
    Case("mistral", "[THINK]hm[/THINK]Hi", (), "Hi", "hm", thoughts="mistral"),
    Case(
        "deepseek_v3",
        f"Wait.<｜tool▁calls▁begin｜>{deepseek('get_weather', OSLO)}\n{deepseek('now', {})}"
        "<｜tool▁calls▁end｜>",
        TWO,
        "Wait.",
    ),
    Case(
        "deepseek_v31",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Oslo", "days": 3}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    Case(
        "deepseek_v3",
        f"I think.\n</think>\n\nOk <｜tool▁calls▁begin｜>{deepseek('now', {})}<｜tool▁calls▁end｜>",
        (("now", {}),),
        "Ok",
        "I think.\n",
        thoughts="deepseek_r1",
    ),
    Case("deepseek_v3", "never ends", (), None, "never ends", thoughts="deepseek_r1"),
    Case("deepseek_v3", "Hi", (), "Hi", None, thoughts="deepseek_v3", prompt="...</think>"),
    Case(
        "kimi_k2",
        f"Ok<|tool_calls_section_begin|>{kimi('get_weather', 0, OSLO)}{kimi('now', 1, {})}"
        "<|tool_calls_section_end|>",
        TWO,
        "Ok",
    ),
    Case("kimi_k2", "◁think▷a◁b◁/think▷c", (), "c", "a◁b", thoughts="kimi"),
    Case(
        "gemma",
        "<start_function_call>call:get_weather{city:<escape>Oslo<escape>,days:3}<end_function_call>",
    ),
    Case(
        "gemma",
        gemma("now", {"a": {"b": [1, "x, {y}", []], "c": {}}, "d": None, "e": True}),
        (("now", {"a": {"b": [1, "x, {y}", []], "c": {}}, "d": None, "e": True}),),
    ),
    Case(
        "gemma",
        "<start_function_call>call:now{a: at noon , b:12:30,}<end_function_call>",
        (("now", {"a": "at noon", "b": "12:30"}),),
    ),
    *(
        Case("gemma", text, (), text)
        for text in (
            "<start_function_call>call:now{a<end_function_call>",
            "<start_function_call>call:now{a:b{c}<end_function_call>",
            "<start_function_call>call:now{a:[1}<end_function_call>",
            "<start_function_call>call:now{}}<end_function_call>",
        )
    ),
    Case("gemma", "```tool_code\nget_weather(city='Oslo', days=3)\n```"),
    Case("gemma", "```tool_code\nprint(1)\n```", (), "```tool_code\nprint(1)\n```"),
    Case("gemma", "```python\nx\n```", (), "```python\nx\n```"),
    Case("hermes", "<think>\nhm <tool</think>\n\nHi", (), "Hi", "\nhm <tool", thoughts="qwen3"),
    Case("hermes", "No thoughts", (), "No thoughts", thoughts="qwen3"),
    Case(
        "hermes",
        f"hm</think>{hermes('now', {})}",
        (("now", {}),),
        None,
        "hm",
        thoughts="qwen3",
        prompt="<|im_start|>assistant\n<think>\n",
    ),
    Case(
        "gpt_oss",
        "<|channel|>analysis<|message|>Need weather.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo", "days": 3}<|call|>',
        reasoning="Need weather.",
        thoughts="gpt_oss",
    ),
    Case(
        "gpt_oss",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi!",
        (),
        "Hi!",
        "Hm.",
        thoughts="gpt_oss",
    ),
    Case(
        "gpt_oss",
        '<|channel|>commentary to=functions.now<|message|>{"a": ',
        (),
        '{"a": ',
        thoughts="gpt_oss",
    ),
    Case("gpt_oss", "plain", (), "plain", thoughts="gpt_oss"),
]


def facts_of(answer: ParsedAnswer) -> tuple:
    """What matters of an answer; ids are made anew each time."""
    calls = tuple((call.name, json.loads(call.arguments)) for call in answer.calls or ())
    return calls, answer.content, answer.reasoning


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.format}: {case.text[:40]}")
def test_answer_whole_is_taken_apart(case):
    """What each family writes is read; what cannot be read is text."""
    found = facts_of(parse_whole(case.parser(), case.text))
    assert found == (case.calls, case.content, case.reasoning)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.format}: {case.text[:40]}")
def test_answer_in_two_pieces_or_single_characters_reads_the_same(case):
    """Every place where a stream can be cut in two, and a stream of characters."""
    whole = facts_of(parse_whole(case.parser(), case.text))
    cuts = [(case.text[:at], case.text[at:]) for at in range(len(case.text) + 1)]
    for pieces in [*cuts, tuple(case.text)]:
        assert facts_of(join(fed(case.parser(), pieces))) == whole, pieces


def fed(parser: AnswerParser, pieces) -> list:
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return [*parts, *parser.finish()]


_MARKS = sorted(
    {mark for one in TOOL_FORMATS.values() for mark in one.marks}
    | {mark for one in REASONING_FORMATS.values() for mark in (one.begin, one.end) if mark}
    | {"<function=now>", "</function>", "<parameter=a>", "</parameter>", "<arg_key>", "</arg_key>"}
    | {"<｜tool▁sep｜>", "<|tool_call_argument_begin|>", "```tool_code\n", "```", "<|call|>"}
    | {"analysis", "final", "to=functions.now", "[now(", ")]", '{"name": "now"', "call:now{"}
    | {
        '"arguments": {}}',
        '{"a": 1}',
        '"',
        "\\",
        "{",
        "}",
        "[",
        "]",
        ";",
        " ",
        "\n",
        "x",
        "functions.now:0",
    }
)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(TOOL_FORMATS)),
    thoughts=st.sampled_from(["", *sorted(REASONING_FORMATS)]),
    pieces=st.lists(st.sampled_from(_MARKS), max_size=14),
    data=st.data(),
)
def test_answer_of_scrambled_marks_reads_the_same_however_it_is_cut(name, thoughts, pieces, data):
    """Nothing raises, and the cuts do not show, whatever nonsense a model writes."""
    case = Case(name, "".join(pieces), thoughts=thoughts)
    whole = facts_of(parse_whole(case.parser(), case.text))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(case.text)), max_size=6)))
    ends = [*cuts, len(case.text)]
    chunks = [case.text[a:b] for a, b in zip([0, *cuts], ends, strict=True)]
    assert facts_of(join(fed(case.parser(), chunks))) == whole


@given(
    answer=st.lists(
        st.tuples(st.sampled_from(["get_weather", "now"]), st.dictionaries(st.text(), st.text())),
        min_size=1,
        max_size=3,
    ),
    indent=st.sampled_from([None, 0, 2]),
    data=st.data(),
)
def test_guaranteed_calls_stream_their_arguments_as_written(answer, indent, data):
    """With tool_choice required the arguments' own text comes through, cut anywhere."""
    calls = [{"name": name, "parameters": arguments} for name, arguments in answer]
    text = json.dumps(calls, indent=indent)
    plan = AnswerPlan(formats=Formats(), mode="required", tools=TOOLS)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = facts_of(join(fed(plan.parser(""), chunks)))
    assert found == (tuple(answer), None, None)


def test_named_call_takes_the_whole_answer_as_arguments():
    """With one tool named, the answer is its arguments."""
    plan = AnswerPlan(formats=Formats(), mode="named", tools=TOOLS[:1])
    parts = fed(plan.parser(""), ['{"ci', 'ty": "Oslo", "days": 3}'])
    assert facts_of(join(parts)) == ((("get_weather", OSLO),), None, None)
    assert parts[0].id.startswith("call_")
    assert parts[1].id is None


def test_only_one_call_is_told_where_only_one_is_wanted():
    """`parallel_tool_calls: false` leaves out what follows the first call."""
    plan = AnswerPlan(formats=Formats(TOOL_FORMATS["hermes"]), mode="auto", is_parallel=False)
    found = parse_whole(plan.parser(""), hermes("now", {}) + hermes("get_weather", OSLO))
    assert facts_of(found) == ((("now", {}),), None, None)


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ('<tool_call>\n{"name": ..., "arguments": ...}', "hermes", None),
        ('<tool_call> "arguments" <think></think>', "hermes", "qwen3"),
        ("<tool_call><function=x><parameter=y>", "qwen3_coder", None),
        ("<tool_call><arg_key>", "glm45", None),
        ("[TOOL_CALLS] [THINK]", "mistral", "mistral"),
        ("<｜Assistant｜> <｜tool▁calls▁begin｜> </think>", "deepseek_v3", "deepseek_v3"),
        ("<|channel|><|message|><|start|>", "gpt_oss", "gpt_oss"),
        ('Environment: ipython {"name":..., "parameters": ...}', "llama3_json", None),
        ("<|tool_calls_section_begin|>", "kimi_k2", None),
        ("{{ messages }}", None, None),
    ],
)
def test_formats_auto_are_those_that_the_template_speaks(template, tools, reasoning):
    """What the template does not say for sure is left open; what was found is said."""
    found = choose_formats("auto", "auto", template, frozenset())
    assert (found.tools and found.tools.name) == tools
    assert (found.reasoning and found.reasoning.name) == reasoning
    assert len(found.said) == (tools is not None) + (reasoning is not None)


def test_formats_unknown_name_is_refused_with_those_that_are_known():
    """A typing error at start does not become silence later."""
    with pytest.raises(ConfigError, match="hermes"):
        choose_formats("hermse", "auto", "", frozenset())


def test_formats_special_marks_make_special_tokens_show():
    """A mark that is a special token would be left out of the text otherwise."""
    assert choose_formats("mistral", "none", "", frozenset({"[TOOL_CALLS]"})).shows_special_tokens
    assert not choose_formats("hermes", "none", "", frozenset({"</s>"})).shows_special_tokens


LONG = {"city": "Oslo " * 30 + '"}</tool_call> [x] é\\', "days": 3, "more": [{"a": None}] * 3}
LONG_JSON = json.dumps(LONG)
LONG_CASES = [
    Case("hermes", f"Ok. {hermes('get_weather', LONG)}{hermes('now', {})}"),
    Case("kimi_k2", f"Ok.{kimi('get_weather', 0, LONG)}{kimi('now', 1, {})}"),
    Case("deepseek_v3", f"Ok.{deepseek('get_weather', LONG)}{deepseek('now', {})}"),
    Case(
        "deepseek_v31",
        f"Ok.<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{LONG_JSON}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
    ),
    Case("mistral", f"Ok.[TOOL_CALLS]get_weather[ARGS]{LONG_JSON}[TOOL_CALLS]now[ARGS]{{}}"),
    Case(
        "gpt_oss",
        "<|channel|>final<|message|>Ok.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.get_weather<|message|>{LONG_JSON}<|call|><|start|>assistant<|channel|>"
        "commentary to=functions.now<|message|>{}<|call|>",
    ),
    Case("qwen3_coder", f"Ok. {qwen_coder('get_weather', LONG)}{qwen_coder('now', {})}"),
    Case("glm45", f"Ok. {glm('get_weather', LONG)}{glm('now', {})}"),
    Case("gemma", f"Ok. {gemma('get_weather', LONG)}{gemma('now', {})}"),
    *(
        Case(name, f"{llama('get_weather', LONG)}; {llama('now', {})}", content="")
        for name in ("llama3_json", "llama4_json")
    ),
]


@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.format)
def test_long_arguments_arrive_piece_by_piece(case):
    """A client sees what is being written, as it is written, and it adds up."""
    parts = fed(case.parser(), case.text)
    calls, content, _ = facts_of(join(parts))
    assert calls == (("get_weather", LONG), ("now", {}))
    assert content == (None if case.content == "" else "Ok.")
    deltas = [part for part in parts if isinstance(part, CallPart) and part.index == 0]
    assert len(deltas) > len(LONG_JSON) // 2
    assert [part.name for part in deltas[:2]] == ["get_weather", None]
    assert deltas[0].id is not None


@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.format)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_long_arguments_read_the_same_however_they_are_cut_or_end(case, data):
    """Every cut of a whole answer, and of one that max_tokens has ended, gives the same."""
    text = case.text[: data.draw(st.integers(0, len(case.text)))]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole, pieces = parse_whole(case.parser(), text), join(fed(case.parser(), chunks))
    assert written(pieces) == written(whole)


def test_string_behind_short_pairs_arrives_piece_by_piece():
    """A file that is written behind its short path is seen while it is written."""
    arguments = {"days": 3, "city": "line\n\n" * 20 + '\t"end"\n'}
    for name, written in (("qwen3_coder", qwen_coder), ("glm45", glm), ("gemma", gemma)):
        case = Case(name, written("get_weather", arguments))
        parts = fed(case.parser(), case.text)
        assert facts_of(join(parts))[0] == (("get_weather", arguments),)
        assert len(parts) > 40, name


_PLAIN_MARKS = (
    *("<parameter=city>", "<parameter=days>\n", "</parameter>", "\n</parameter>", "</function>"),
    *("<arg_key>", "city", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>", "\n"),
    *("<escape>", "city:", ",", "}", "{", "[", "]", "1", "<end_function_call>", "<tool_call>"),
    *(";", '"', '"name": "now", "parameters": {', "x" * 30, "y" * 62),
)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["qwen3_coder", "glm45", "gemma", "llama3_json"]),
    pieces=st.lists(
        st.sampled_from(_PLAIN_MARKS),
        max_size=16,
    ),
    data=st.data(),
)
def test_arguments_of_nonsense_read_the_same_however_they_are_cut(name, pieces, data):
    """Whatever stands where long arguments began, the cuts of the stream do not show."""
    begin = {
        "qwen3_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\n",
        "glm45": "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>",
        "gemma": "<start_function_call>call:get_weather{city:<escape>",
        "llama3_json": '{"name": "now", "parameters": {"city": "',
    }[name]
    case = Case(name, begin + "".join(pieces))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(case.text)), max_size=6)))
    ends = [*cuts, len(case.text)]
    chunks = [case.text[a:b] for a, b in zip([0, *cuts], ends, strict=True)]
    whole = written(parse_whole(case.parser(), case.text))
    assert written(join(fed(case.parser(), chunks))) == whole
    assert written(join(fed(case.parser(), case.text))) == whole


def test_mark_within_arguments_reads_the_same_however_it_is_cut():
    """A mark at the place where it is decided that arguments are long changes nothing."""
    for before in range(40, 62):
        body = json.dumps({"city": f"{'x' * before}<|call|>{'y' * 40}"})
        case = Case(
            "gpt_oss", f"<|channel|>commentary to=functions.now<|message|>{body}<|call|>",
            thoughts="gpt_oss",
        )  # fmt: skip
        whole = written(parse_whole(case.parser(), case.text))
        assert written(join(fed(case.parser(), tuple(case.text)))) == whole
        for at in range(len(case.text)):
            cut = (case.text[:at], case.text[at:])
            assert written(join(fed(case.parser(), cut))) == whole


def written(answer: ParsedAnswer) -> tuple:
    calls = tuple((call.name, call.arguments) for call in answer.calls or ())
    return calls, answer.content, answer.reasoning
