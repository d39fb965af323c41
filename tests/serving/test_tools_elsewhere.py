"""Tools, thoughts and forms of output through Responses and Anthropic's messages."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import anthropic
import openai
import pytest
from asking import connected, served_in_thread
from fake_engine import FakeEngine
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "name": "get_weather", "parameters": SCHEMA}
ANTHROPIC_TOOL = {"name": "get_weather", "input_schema": SCHEMA}
TEXT = f"<think>Oslo.</think>I look.{CALL}{CALL}"
QUESTION = "How is the weather in Oslo?"


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(reply=lambda prompt, index: TEXT)


@pytest.fixture(scope="module")
def address(engine) -> Iterator[str]:
    settings = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    with served_in_thread(engine, **settings) as address:
        yield address


@pytest.fixture
def client(address) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(address) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=address, api_key="any", max_retries=0) as client:
        yield client


def shape(output) -> list[tuple]:
    """An answer's items, without their ids."""
    found = []
    for item in output:
        if item.type == "function_call":
            found.append((item.type, item.name, item.arguments))
        else:
            found.append((item.type, item.content[0].text))
    return found


def test_response_has_thoughts_text_and_calls_as_items(client):
    """Each part of the turn is an item of its own, whole and streamed alike."""
    fields = {"model": "fake", "input": QUESTION, "tools": [TOOL], "max_output_tokens": 400}
    expected = [
        ("reasoning", "Oslo."),
        ("message", "I look."),
        *[("function_call", "get_weather", '{"city": "Oslo"}')] * 2,
    ]
    whole = client.responses.create(**fields)
    assert shape(whole.output) == expected
    with client.responses.stream(**fields) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert shape(final.output) == expected
    assert kinds.count("response.function_call_arguments.done") == 2
    assert (
        kinds.count("response.output_item.added") == 4 == kinds.count("response.output_item.done")
    )


def test_response_goes_on_after_a_call(client, engine):
    """The tool's result is the next input, by id or with the items themselves."""
    fields = {"model": "fake", "tools": [TOOL], "max_output_tokens": 400}
    first = client.responses.create(**fields, input=QUESTION)
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "Snow."}
        for item in first.output
        if item.type == "function_call"
    ]
    assert len(results) == 2
    client.responses.create(**fields, input=results, previous_response_id=first.id)
    by_id = engine.submitted[-1].prompt
    items = [item.model_dump(exclude_none=True) for item in first.output]
    question = {"role": "user", "content": QUESTION}
    client.responses.create(**fields, input=[question, *items, *results])
    assert engine.submitted[-1].prompt == by_id
    assert by_id.count("Snow.") == 2


def test_response_form_of_output_binds_the_engine(client, engine):
    """text.format reaches the engine as the schema that it is."""
    form = {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}
    client.responses.create(model="fake", input="a", text={"format": form})
    assert json.dumps(SCHEMA["properties"]) in str(
        json.dumps(engine.submitted[-1].params.structured_outputs.json)
    )
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="fake", input="a", text={"format": {"type": "poem"}})
    assert refused.value.param == "text"


def test_message_has_thoughts_text_and_calls_as_blocks(claude):
    """Each part of the turn is a block of its own, whole and streamed alike."""
    fields = {
        "model": "fake",
        "max_tokens": 400,
        "messages": [{"role": "user", "content": QUESTION}],
        "tools": [ANTHROPIC_TOOL],
    }
    whole = claude.messages.create(**fields)
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert whole.content[0].thinking == "Oslo."
    assert whole.content[2].input == {"city": "Oslo"}
    assert whole.stop_reason == "tool_use"
    with claude.messages.stream(**fields) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == [block.type for block in whole.content]
    assert final.content[3].input == {"city": "Oslo"}
    assert final.stop_reason == "tool_use"


def test_message_budget_of_thoughts_reaches_the_engine(claude, engine):
    """`budget_tokens` is held, not dropped; with thinking off it has no sense."""
    messages = [{"role": "user", "content": "Hi"}]
    given = {"model": "fake", "max_tokens": 2000, "messages": messages}
    claude.messages.create(**given, thinking={"type": "enabled", "budget_tokens": 1024})
    assert engine.submitted[-1].params.thinking_limit.max_tokens == 1024
    for thinking in (
        {"type": "adaptive", "budget_tokens": 1024},
        {"type": "enabled", "budget_tokens": 0},
        {"type": "enabled", "budget_tokens": "many"},
    ):
        with pytest.raises(anthropic.BadRequestError, match="thinking"):
            claude.messages.create(**given, extra_body={"thinking": thinking})


def test_message_goes_on_after_a_call(claude, engine):
    """Blocks of an answer and results of tools, put back, become chat's messages."""
    first = claude.messages.create(
        model="fake",
        max_tokens=400,
        messages=[{"role": "user", "content": QUESTION}],
        tools=[ANTHROPIC_TOOL],
    )
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "Snow."}
        for block in first.content
        if block.type == "tool_use"
    ]
    claude.messages.create(
        model="fake",
        max_tokens=400,
        messages=[
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [*results, {"type": "text", "text": "And now?"}]},
        ],
        tools=[ANTHROPIC_TOOL],
        tool_choice={"type": "auto"},
    )
    asked = engine.submitted[-1].prompt
    assert asked.count("Snow.") == 2
    assert asked.index("Snow.") < asked.index("And now?")


async def test_response_stream_has_every_event_in_its_order_and_number(engine):
    """Thoughts, text and calls: each event is one that the library defines, none is left out."""
    settings = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    body = {"input": QUESTION, "tools": [TOOL], "max_output_tokens": 400, "stream": True}
    async with connected(engine, **settings) as client:
        text = (await client.post("/v1/responses", json=body)).text
    lines = [line for line in text.splitlines() if line.startswith("data: {")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    adapter = TypeAdapter(ResponseStreamEvent)
    for event in events:
        assert adapter.validate_python(event).type == event["type"]
    kinds = [kind for kind, _ in itertools.groupby(event["type"] for event in events)]
    part = ("response.content_part.added", "response.content_part.done")
    item = ("response.output_item.added", "response.output_item.done")
    call = [f"response.function_call_arguments.{step}" for step in ("delta", "done")]
    thought = [f"response.reasoning_text.{step}" for step in ("delta", "done")]
    said = [f"response.output_text.{step}" for step in ("delta", "done")]
    assert kinds == [
        *("response.created", "response.in_progress"),
        *(item[0], part[0], *thought, part[1], item[1]),
        *(item[0], part[0], *said, part[1], item[1]),
        *(item[0], *call, item[1]) * 2,
        "response.completed",
    ]
