"""Tools, thoughts and forms of output over HTTP, asked by the API's own client library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from asking import connected, error_of, served_in_thread
from fake_engine import FakeEngine
from tokenizers import Tokenizer

import quire
from quire.core.engine.grammars import constraint_of
from quire.core.errors import ConfigError
from quire.core.sampling_params import SamplingParams, StructuredOutputsParams
from quire.core.serving.http.app import make_app
from quire.core.serving.settings import ServerSettings
from quire.core.serving.tools.events import parse_whole
from quire.core.serving.tools.plan import AnswerPlan
from quire.core.serving.tools.registry import choose_formats
from quire.core.structured.compiler import CompiledGrammar, GrammarCompiler

TOKENIZER = Path(quire.__file__).parent / "demo" / "tokenizer.json"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
MESSAGES = [{"role": "user", "content": "How is the weather in Oslo?"}]
HISTORY = [
    *MESSAGES,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "Snow."},
]


class Replying:
    """A server around an engine that says what the test chose."""

    def __init__(self) -> None:
        self.engine = FakeEngine(reply=lambda prompt, index: self.text)
        self.text = ""


@pytest.fixture
def replying() -> Replying:
    return Replying()


@pytest.fixture
def client(replying) -> Iterator[openai.OpenAI]:
    settings = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    with (
        served_in_thread(replying.engine, **settings) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client,
    ):
        yield client


def ask(client: openai.OpenAI, **fields):
    given = {"model": "fake", "messages": MESSAGES, "max_tokens": 400}
    return client.chat.completions.create(**{**given, **fields})


def joined(chunks) -> dict:
    """What a stream adds up to, as the whole answer tells it."""
    found: dict = {"content": "", "reasoning": "", "calls": {}, "finish_reason": None}
    for chunk in chunks:
        for choice in chunk.choices:
            delta = choice.delta
            found["content"] += delta.content or ""
            found["reasoning"] += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or ():
                name, arguments = found["calls"].get(call.index, ("", ""))
                function = call.function
                found["calls"][call.index] = (
                    name + (function.name or ""),
                    arguments + (function.arguments or ""),
                )
            found["finish_reason"] = choice.finish_reason or found["finish_reason"]
    return found


def told(answer) -> dict:
    """The whole answer, in the same form."""
    choice = answer.choices[0]
    calls = choice.message.tool_calls or ()
    return {
        "content": choice.message.content or "",
        "reasoning": getattr(choice.message, "reasoning_content", None) or "",
        "calls": {i: (c.function.name, c.function.arguments) for i, c in enumerate(calls)},
        "finish_reason": choice.finish_reason,
    }


WEATHER = ("get_weather", '{"city": "Oslo"}')


@pytest.mark.parametrize(
    ("text", "fields", "content", "reasoning", "calls"),
    [
        (CALL, {"tools": [TOOL]}, "", "", [WEATHER]),
        (f"I look.\n{CALL}{CALL}", {"tools": [TOOL]}, "I look.", "", [WEATHER] * 2),
        (f"{CALL}{CALL}", {"tools": [TOOL], "parallel_tool_calls": False}, "", "", [WEATHER]),
        (f"<think>Hm.</think>{CALL}", {"tools": [TOOL]}, "", "Hm.", [WEATHER]),
        ("<think>Hm.</think>\n\nHi", {}, "Hi", "Hm.", []),
        ("<think>Hm.</think>Hi", {"extra_body": {"include_reasoning": False}}, "Hi", "", []),
        (CALL, {}, CALL, "", []),
        (CALL, {"tools": [TOOL], "tool_choice": "none"}, CALL, "", []),
        (
            "<tool_call>broken</tool_call>",
            {"tools": [TOOL]},
            "<tool_call>broken</tool_call>",
            "",
            [],
        ),
        (
            '[{"name": "get_weather", "parameters": {"city": "Oslo"}}]',
            {"tools": [TOOL], "tool_choice": "required"},
            "",
            "",
            [WEATHER],
        ),
        (
            '{"city": "Oslo"}',
            {
                "tools": [TOOL, NOW],
                "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
            },
            "",
            "",
            [WEATHER],
        ),
    ],
)
def test_openai_client_reads_calls_and_thoughts(
    client, replying, text, fields, content, reasoning, calls
):
    """Streamed or whole, the library finds the same calls, thoughts and text."""
    replying.text = text
    expected = {
        "content": content,
        "reasoning": reasoning,
        "calls": dict(enumerate(calls)),
        "finish_reason": "tool_calls" if calls else "stop",
    }
    whole = ask(client, **fields)
    assert told(whole) == expected
    assert joined(ask(client, stream=True, **fields)) == expected
    ids = [call.id for call in whole.choices[0].message.tool_calls or ()]
    assert len(set(ids)) == len(calls)
    assert all(ids)


def test_openai_conversation_with_results_reaches_the_template(client, replying):
    """Calls and their results go to the chat template as transformers' templates expect them."""
    replying.text = "It snows."
    answer = ask(client, messages=HISTORY, tools=[TOOL])
    assert answer.choices[0].message.content == "It snows."
    prompt = replying.engine.submitted[-1].prompt
    assert "Snow." in prompt
    rendered = replying.engine.rendered[-1]
    call = rendered["messages"][1]["tool_calls"][0]
    assert call["function"] == {"name": "get_weather", "arguments": {"city": "Oslo"}}
    assert rendered["messages"][2]["tool_call_id"] == "call_1"
    assert rendered["tools"] == [TOOL]


def test_openai_answer_with_calls_goes_back_into_the_conversation(client, replying):
    """The library's own message object is accepted as it is."""
    replying.text = f"<think>Hm.</think>{CALL}"
    message = ask(client, tools=[TOOL]).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Snow."}
    replying.text = "It snows."
    again = ask(client, tools=[TOOL], messages=[*MESSAGES, message, result])
    assert again.choices[0].message.content == "It snows."


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "integer"}, "strict": True},
                }
            },
            {"json": {"type": "integer"}},
        ),
        ({"guided_json": {"type": "integer"}}, {"json": {"type": "integer"}}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"structured_outputs": {"regex": "a"}}, {"regex": "a"}),
        ({"structured_outputs": {"json": "{}"}}, {"json": "{}"}),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_form_of_output_reaches_the_engine(replying, path, fields, form):
    """Both endpoints know OpenAI's names and vLLM's."""
    replying.text = "{}"
    body = {"messages": MESSAGES} if "chat" in path else {"prompt": "x"}
    async with connected(replying.engine) as client:
        response = await client.post(path, json={**body, **fields})
    assert response.status_code == 200, response.text
    asked = replying.engine.submitted[-1].params.structured_outputs
    assert {name: getattr(asked, name) for name in asked.forms} == form


async def test_required_call_asks_the_engine_for_calls_alone(replying):
    """What the model may say is a list of calls of the given tools, or of the named one."""
    replying.text = "[]"
    async with connected(replying.engine) as client:
        body = {"messages": MESSAGES, "tools": [TOOL, NOW], "tool_choice": "required"}
        await client.post("/v1/chat/completions", json=body)
        schema = replying.engine.submitted[-1].params.structured_outputs.json
        assert schema["minItems"] == 1
        names = [item["properties"]["name"]["const"] for item in schema["items"]["anyOf"]]
        assert names == ["get_weather", "now"]


@pytest.mark.parametrize(
    ("prompt", "begin"), [("Hi", "<think>"), ("Hi <think>\n", None), ("Hi </think>", "none")]
)
async def test_budget_of_thoughts_reaches_the_engine(replying, prompt, begin):
    """Counted from the mark that opens thoughts, or from the start where the prompt did."""
    replying.text = "x"
    fields = {"thinking_token_budget": 7, "messages": [{"role": "assistant", "content": prompt}]}
    fields |= {"continue_final_message": True, "chat_template": "{{ messages[0].content }}"}
    settings = {"reasoning_parser": "qwen3", "trust_request_chat_template": True}
    async with connected(replying.engine, **settings) as client:
        response = await client.post("/v1/chat/completions", json=fields)
    assert response.status_code == 200, response.text
    limit = replying.engine.submitted[-1].params.thinking_limit
    found = "none" if limit is None else limit.begin
    assert found == begin
    assert limit is None or (limit.end, limit.max_tokens) == ("</think>", 7)


@pytest.mark.parametrize("thoughts", ["none", "gpt_oss"])
async def test_budget_of_thoughts_that_nobody_can_end_is_refused(replying, thoughts):
    """What cannot be held is not accepted."""
    async with connected(replying.engine, reasoning_parser=thoughts) as client:
        body = {"messages": MESSAGES, "thinking_token_budget": 7}
        error = error_of(await client.post("/v1/chat/completions", json=body), 400)
    assert error["param"] == "thinking_token_budget"


@pytest.mark.parametrize(
    ("parser", "fields"),
    [
        ("llama3_json", {"response_format": {"type": "json_object"}}),
        ("pythonic", {"response_format": {"type": "json_object"}}),
        ("hermes", {"guided_regex": "a+"}),
        ("hermes", {"response_format": {"type": "json_object"}, "tool_choice": "required"}),
    ],
)
async def test_form_and_tools_of_which_no_grammar_can_be_made_are_refused(replying, parser, fields):
    """An answer of a fixed form could call no tool: nothing of the two is dropped in silence."""
    async with connected(replying.engine, tool_call_parser=parser) as client:
        body = {"messages": MESSAGES, "tools": [TOOL], **fields}
        error = error_of(await client.post("/v1/chat/completions", json=body), 400)
    assert error["param"] == "response_format"


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    size = Tokenizer.from_file(str(TOKENIZER)).get_vocab_size()
    compiler = GrammarCompiler(TOKENIZER.read_text, vocab_size=size)
    yield compiler
    compiler.close()


def test_answer_is_calls_or_keeps_to_the_form_that_is_asked_for(compiler):
    """With both a form and tools, the model has exactly these two ways, and each is read."""
    formats = choose_formats("hermes", "none", "", frozenset())
    schema = {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"]}
    schema["additionalProperties"] = False
    for is_parallel in (True, False):
        params = SamplingParams(structured_outputs=StructuredOutputsParams(json=schema))
        tools = [TOOL, NOW]
        plan = AnswerPlan(formats=formats, mode="auto", tools=tools, is_parallel=is_parallel)
        plan.apply(params, "")
        grammar = compiler.compile(constraint_of(params, None).grammar)
        form, call = formats.call_form, formats.call_form.between.join
        one = f'{form.before_name}"get_weather"{form.after_name}{{"city": "Oslo"}}{form.end}'
        two = f'{form.before_name}"now"{form.after_name}{{}}{form.end}'
        assert fits(grammar, '{"warm": true}')
        assert fits(grammar, one)
        assert fits(grammar, call([two, one])) == is_parallel
        for other in ("It is warm.", '{"warm": 3}', one.replace("weather", "time"), f"{one}."):
            assert not fits(grammar, other)
        assert parse_whole(plan.parser(""), '{"warm": true}').content == '{"warm": true}'
        assert parse_whole(plan.parser(""), one).calls[0].name == "get_weather"


def fits(grammar: CompiledGrammar, text: str) -> bool:
    """Whether a grammar allows a text and its end there."""
    matcher = grammar.start()
    return all(map(matcher.consume_token, grammar.tokenizer.tokenize_str(text))) and (
        matcher.is_accepting()
    )


def test_form_and_tools_whose_marks_are_special_tokens_are_refused():
    """A grammar of text cannot say a token that is none."""
    assert choose_formats("hermes", "none", "", frozenset({"<tool_call>"})).call_form is None
    assert choose_formats("hermes", "none", "", frozenset({"<|im_end|>"})).call_form is not None


async def test_special_tokens_show_where_they_mark_calls(replying):
    """Marks that are special tokens must stand in the text, or nobody could read them."""
    replying.engine.tokenizer = _TokenizerWith("[TOOL_CALLS]")
    replying.text = '[TOOL_CALLS][{"name": "now", "arguments": {}}]'
    async with connected(replying.engine) as client:
        body = {"messages": MESSAGES, "tools": [NOW], "max_tokens": 99}
        answer = (await client.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "now"
    assert len(answer["choices"][0]["message"]["tool_calls"][0]["id"]) == 9
    assert replying.engine.submitted[-1].params.skip_special_tokens is False


def test_settings_unknown_parser_is_refused_before_the_model_loads():
    """A typing error costs no minutes."""
    with pytest.raises(ConfigError, match="qwen3_coder"):
        ServerSettings(tool_call_parser="qwen")


class _Token:
    def __init__(self, content: str) -> None:
        self.content, self.special = content, True


class _TokenizerWith:
    """A tokenizer as far as the server looks at it."""

    def __init__(self, mark: str) -> None:
        self.chat_template = f"... {mark} ..."
        self.added_tokens_decoder = {5: _Token(mark)}


def test_openai_stream_of_a_named_call_tells_arguments_as_they_come(client, replying):
    """Where a grammar guarantees the arguments, nobody waits for their end."""
    replying.text = json.dumps({"city": "a long name of a city"})
    choice = {"type": "function", "function": {"name": "get_weather"}}
    chunks = ask(client, stream=True, tools=[TOOL], tool_choice=choice)
    pieces = [c for chunk in chunks for ch in chunk.choices for c in ch.delta.tool_calls or ()]
    assert len(pieces) > 3
    assert "".join(piece.function.arguments or "" for piece in pieces) == replying.text


def test_app_knows_the_formats_of_its_model(replying):
    """What the chat template shows for sure is taken, and can be said aloud."""
    replying.engine.tokenizer = _TokenizerWith("[TOOL_CALLS]")
    formats = make_app(replying.engine, ServerSettings()).state.server.formats
    assert formats.tools.name == "mistral"
    assert formats.said == ("tool_call_parser: mistral (the chat template writes [TOOL_CALLS])",)
    silent = make_app(replying.engine, ServerSettings(tool_call_parser="none")).state.server.formats
    assert silent.tools is None
