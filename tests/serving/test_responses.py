"""/v1/responses: the sequence of its events, what it remembers and for whom, and what it refuses."""

from __future__ import annotations

import asyncio
import json

import pytest
from asking import LeavingClient, connected, error_of, served_in_thread
from fake_engine import REPLY, FakeEngine
from openai import BadRequestError, NotFoundError, OpenAI

from quire.core.serving.answers.response_store import ResponseStore

PATH = "/v1/responses"


def named_events(text: str) -> list[dict]:
    """The events of a stream; holds it to the format: the name is the type, numbers have no gap."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        events.append(event)
    return events


@pytest.fixture
def openai_client(engine):
    with (
        served_in_thread(engine) as address,
        OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client,
    ):
        yield client


def test_response_is_understood_by_the_library(openai_client):
    """Text, status, usage and the echoed settings are where the library looks for them."""
    response = openai_client.responses.create(
        model="fake", input="hi", instructions="Be brief", temperature=0.5, metadata={"a": "b"}
    )
    assert response.output_text == REPLY
    assert (response.status, response.error) == ("completed", None)
    assert response.usage.output_tokens == len(REPLY) + 1
    assert (response.instructions, response.temperature) == ("Be brief", 0.5)
    assert response.metadata == {"a": "b"}


def test_response_stream_adds_up_in_the_library(openai_client):
    """The library's own accumulator, which checks the order of events, ends with the whole answer."""
    with openai_client.responses.stream(model="fake", input="hi") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert final.output_text == REPLY


def test_response_goes_on_by_id(openai_client, engine):
    """The next turn sees the earlier ones but not their instructions, as the API has it."""
    first = openai_client.responses.create(model="fake", input="one", instructions="old")
    second = openai_client.responses.create(
        model="fake", input="two", previous_response_id=first.id, instructions="new"
    )
    assert second.previous_response_id == first.id
    asked = engine.submitted[-1].prompt
    assert asked == f"<system>new\n<user>one\n<assistant>{REPLY}\n<user>two\n<assistant>"


def test_response_is_kept_and_deleted(openai_client):
    """What is stored is had again, with its input, until it is deleted; what is not, is not."""
    kept = openai_client.responses.create(model="fake", input="one")
    assert openai_client.responses.retrieve(kept.id) == kept
    [item] = openai_client.responses.input_items.list(kept.id)
    assert item.content == "one"
    openai_client.responses.delete(kept.id)
    with pytest.raises(NotFoundError):
        openai_client.responses.retrieve(kept.id)
    gone = openai_client.responses.create(model="fake", input="one", store=False)
    with pytest.raises(NotFoundError):
        openai_client.responses.retrieve(gone.id)


def test_response_items_become_the_conversation(openai_client, engine):
    """Output items of an answer, put back into the input, and parts of text are understood."""
    first = openai_client.responses.create(model="fake", input="one")
    openai_client.responses.create(
        model="fake",
        input=[
            {"role": "developer", "content": [{"type": "input_text", "text": "rules"}]},
            {"role": "user", "content": "one"},
            *[item.model_dump(exclude_none=True) for item in first.output],
            {"role": "user", "content": [{"type": "input_text", "text": "two"}]},
        ],
    )
    asked = engine.submitted[-1].prompt
    assert asked == f"<system>rules\n<user>one\n<assistant>{REPLY}\n<user>two\n<assistant>"


def test_response_that_is_cut_is_incomplete(openai_client):
    """The bound of tokens is told as the reason, and usage counts what was written."""
    response = openai_client.responses.create(model="fake", input="a", max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert (response.output_text, response.usage.output_tokens) == (REPLY[:3], 3)


def test_response_logprobs_are_told_where_asked(openai_client):
    """Log-probabilities come with `include` and with `top_logprobs`, and not otherwise."""
    asked = {"model": "fake", "input": "a"}
    plain = openai_client.responses.create(**asked).output[0].content[0]
    told = openai_client.responses.create(**asked, top_logprobs=1).output[0].content[0]
    assert plain.logprobs == []
    # The end-of-sequence token is no text, and its entry goes with the last piece of text or none.
    assert [token.token for token in told.logprobs][: len(REPLY)] == list(REPLY)
    assert len(told.logprobs[0].top_logprobs) == 1


def test_response_refusals_name_the_field(openai_client):
    """What is refused on the way through chat is named as this endpoint has it."""
    for fields, param in (
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "c"}, "conversation"),
        ({"input": [{"type": "input_image"}]}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"role": "nobody", "content": "a"}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"background": True, "store": False}, "store"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
    ):
        with pytest.raises(BadRequestError) as refused:
            openai_client.responses.create(**{"model": "fake", "input": "a", **fields})
        assert refused.value.param == param, refused.value


async def test_response_in_the_background_is_asked_for_later():
    """It is answered at once, found by its id while it is written, and finished without a client."""
    engine = FakeEngine(hold=asyncio.Event())
    async with connected(engine) as client:
        body = {"input": "a", "background": True}
        queued = (await client.post(PATH, json=body)).json()
        assert queued["status"] in {"queued", "in_progress"}
        url = f"{PATH}/{queued['id']}"
        assert (await client.get(url)).json()["status"] == "in_progress"
        engine.hold.set()
        await client.app.state.responses.get(queued["id"], None).task
        done = (await client.get(url)).json()
        assert done["status"] == "completed"
        assert done["output"][0]["content"][0]["text"] == REPLY
        assert engine.num_unfinished == 0


@pytest.mark.parametrize("way", ["cancel", "delete"])
async def test_response_in_the_background_is_ended(way):
    """Cancelling or deleting ends the request in the engine, and leaves no task."""
    engine = FakeEngine(hold=asyncio.Event())
    async with connected(engine) as client:
        queued = (await client.post(PATH, json={"input": "a", "background": True})).json()
        url = f"{PATH}/{queued['id']}"
        if way == "cancel":
            assert (await client.post(f"{url}/cancel")).json()["status"] == "cancelled"
            assert (await client.get(url)).json()["status"] == "cancelled"
        else:
            assert (await client.delete(url)).json()["deleted"] is True
        assert engine.num_unfinished == 0
        assert client.app.state.server.gate.num_inside == 0


async def test_response_in_the_foreground_is_not_cancelled_by_id(client):
    """The API cancels background responses alone."""
    done = (await client.post(PATH, json={"input": "a"})).json()
    assert error_of(await client.post(f"{PATH}/{done['id']}/cancel"), 400)["param"] == "response_id"


@pytest.mark.parametrize("field", ["fail_at", "die_at"])
async def test_response_stream_that_fails_says_so(field):
    """A failure in mid-stream is the event `response.failed`, with the reason, and the last one."""
    async with connected(FakeEngine(**{field: 3})) as client:
        answer = await client.post(PATH, json={"input": "a", "stream": True})
        last = named_events(answer.text)[-1]
        assert last["type"] == "response.failed"
        assert last["response"]["error"]["message"]
        whole = await client.post(PATH, json={"input": "a"})
        error_of(whole, 500 if field == "fail_at" else 503)


async def test_response_client_that_leaves_ends_the_request():
    """Nothing stays of a stream whose client went away, and it is not remembered as finished."""
    engine = FakeEngine(hold=asyncio.Event())
    async with connected(engine) as client:
        leaving = LeavingClient(client.app, PATH, {"input": "a", "stream": True})
        task = asyncio.create_task(leaving.run())
        await leaving.has_events.wait()
        leaving.leaves.set()
        await task
        assert engine.num_unfinished == 0
        assert len(client.app.state.responses) == 0


async def test_response_of_one_key_is_hidden_from_others():
    """A key sees its own conversations alone: another's id is as if it were not there."""
    async with connected(FakeEngine(), api_keys=("one", "two")) as client:
        mine, other = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        done = (await client.post(PATH, json={"input": "a"}, headers=mine)).json()
        url = f"{PATH}/{done['id']}"
        assert (await client.get(url, headers=mine)).status_code == 200
        error_of(await client.get(url, headers=other), 404)
        error_of(await client.delete(url, headers=other), 404)
        follow = {"input": "a", "previous_response_id": done["id"]}
        error_of(await client.post(PATH, json=follow, headers=other), 404)


async def test_response_store_is_bounded(client):
    """The oldest are forgotten, by number and by size."""
    for limits in ({"max_responses": 2}, {"max_bytes": 4000}):
        client.app.state.responses = ResponseStore(**limits)
        ids = [(await client.post(PATH, json={"input": "a" * 200})).json()["id"] for _ in range(5)]
        found = [(await client.get(f"{PATH}/{one}")).status_code for one in ids]
        assert found[0] == 404
        assert found[-1] == 200
        assert len(client.app.state.responses) <= 2


async def test_response_usage_counts_the_whole_stream(client):
    """The streamed answer is the whole one, with the same usage."""
    whole = (await client.post(PATH, json={"input": "a"})).json()
    text = (await client.post(PATH, json={"input": "a", "stream": True})).text
    streamed = named_events(text)[-1]["response"]
    assert streamed["usage"] == whole["usage"]
    told = [item["content"] for item in streamed["output"]]
    assert told == [item["content"] for item in whole["output"]]
