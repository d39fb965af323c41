"""/v1/messages through the Anthropic client: whole, streamed, counted and refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import anthropic
import httpx
import pytest
from asking import LeavingClient, connected, served_in_thread
from fake_engine import REPLY, FakeEngine

KEY = "the-key"
PATH = "/v1/messages"
MESSAGES = [{"role": "user", "content": "hi"}]
BODY = {"model": "fake", "max_tokens": 20, "messages": MESSAGES}


@pytest.fixture
def client(engine) -> Iterator[anthropic.Anthropic]:
    with (
        served_in_thread(engine, api_keys=(KEY,)) as address,
        anthropic.Anthropic(base_url=address, api_key=KEY, max_retries=0) as client,
    ):
        yield client


def test_anthropic_message_is_understood(client, engine):
    """The library reads text, reason and usage; the key comes in its own header."""
    answer = client.messages.create(**BODY, system="Be brief", extra_body={"top_k": 3})
    assert [block.text for block in answer.content] == [REPLY]
    assert (answer.role, answer.stop_reason, answer.stop_sequence) == (
        "assistant",
        "end_turn",
        None,
    )
    assert answer.usage.output_tokens == len(REPLY) + 1
    total = answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    assert total == len(engine.submitted[0].prompt)
    assert engine.submitted[0].prompt == "<system>Be brief\n<user>hi\n<assistant>"
    assert engine.submitted[0].params.top_k == 3


def test_anthropic_stream_adds_up(client):
    """The library's accumulator, which knows the order of events, ends with the whole answer."""
    whole = client.messages.create(**BODY)
    with client.messages.stream(**BODY) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert kinds.count("content_block_start") == 1
    assert [block.text for block in final.content] == [REPLY]
    assert (final.stop_reason, final.usage) == (whole.stop_reason, whole.usage)


def test_anthropic_reasons_are_told(client):
    """A bound of tokens and a stop sequence are told apart, and the sequence is named."""
    cut = client.messages.create(**{**BODY, "max_tokens": 3})
    assert (cut.stop_reason, cut.content[0].text) == ("max_tokens", REPLY[:3])
    stopped = client.messages.create(**BODY, stop_sequences=[", "])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", ", ")
    assert stopped.content[0].text == "Hello"


def test_anthropic_blocks_become_the_conversation(client, engine):
    """Blocks of text, an answer put back, and a system of blocks are understood."""
    first = client.messages.create(**BODY)
    client.messages.create(
        model="fake",
        max_tokens=5,
        system=[{"type": "text", "text": "rules", "cache_control": {"type": "ephemeral"}}],
        messages=[
            *MESSAGES,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [{"type": "text", "text": "more"}]},
        ],
    )
    asked = engine.submitted[-1].prompt
    assert asked == f"<system>rules\n<user>hi\n<assistant>{REPLY}\n<user>more\n<assistant>"


def test_anthropic_tokens_are_counted(client, engine):
    """The count is that of the prompt which answering would submit."""
    count = client.messages.count_tokens(model="fake", messages=MESSAGES, system="s")
    client.messages.create(**BODY, system="s")
    assert count.input_tokens == len(engine.submitted[-1].prompt)


def test_anthropic_errors_have_their_types(client):
    """The library raises the exception that belongs to each refusal, in this API's form."""
    for fields, word in (
        ({"extra_body": {"temperature": -1}}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"mcp_servers": [{"x": 1}]}}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "budget_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image"),
        ({"messages": []}, "messages"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
    ):
        with pytest.raises(anthropic.BadRequestError, match=word) as bad:
            client.messages.create(**{**BODY, **fields})
        assert bad.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**{**BODY, "model": "other"})
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(**BODY)


@pytest.mark.parametrize("field", ["fail_at", "die_at"])
async def test_message_stream_that_fails_says_so(field):
    """A failure in mid-stream is an event `error` in this API's form, and the last one."""
    async with connected(FakeEngine(**{field: 3})) as client:
        answer = await client.post(PATH, json={**BODY, "stream": True})
        last = answer.text.rstrip("\n").split("\n\n")[-1]
        assert last.startswith('event: error\ndata: {"type":"error"')
        assert (await client.post(PATH, json=BODY)).json()["type"] == "error"


async def test_message_client_that_leaves_ends_the_request():
    """Nothing stays of a stream whose client went away."""
    engine = FakeEngine(hold=asyncio.Event())
    async with connected(engine) as client:
        leaving = LeavingClient(client.app, PATH, {**BODY, "stream": True})
        task = asyncio.create_task(leaving.run())
        await leaving.has_events.wait()
        leaving.leaves.set()
        await task
    assert engine.num_unfinished == 0


async def test_message_body_that_is_broken_is_refused_in_form():
    """Also what is no JSON is answered in this API's form."""
    async with connected(FakeEngine()) as client:
        for content in (b"", b"{", b"[]", b'{"messages": 1}'):
            response: httpx.Response = await client.post(PATH, content=content)
            assert response.status_code == 400
            assert response.json()["error"]["type"] == "invalid_request_error"
