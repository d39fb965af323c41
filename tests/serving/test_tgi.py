"""/generate and its kin through huggingface_hub's client, which text-generation-inference has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from asking import connected, served_in_thread
from fake_engine import REPLY, FakeEngine
from huggingface_hub import InferenceClient, constants
from huggingface_hub.errors import ValidationError


@pytest.fixture
def address(engine) -> Iterator[str]:
    with served_in_thread(engine) as address:
        yield address


@pytest.fixture
def hub_client(address, monkeypatch) -> InferenceClient:
    # Tests reach no hub; this library counts a server of this machine to it.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return InferenceClient(model=address)


def test_tgi_text_is_understood(hub_client, engine):
    """The library reads the text; without sampling fields the likeliest token is taken."""
    assert hub_client.text_generation("ab") == REPLY
    assert hub_client.text_generation("ab", return_full_text=True) == f"ab{REPLY}"
    assert engine.submitted[0].params.temperature == 0.0
    hub_client.text_generation("ab", do_sample=True, temperature=0.7, seed=3)
    assert (engine.submitted[-1].params.temperature, engine.submitted[-1].params.seed) == (0.7, 3)


def test_tgi_details_are_understood(hub_client):
    """Reason, tokens with log-probabilities, top tokens and the prompt's tokens."""
    answer = hub_client.text_generation(
        "ab", details=True, decoder_input_details=True, top_n_tokens=2, max_new_tokens=4
    )
    details = answer.details
    assert (details.finish_reason, details.generated_tokens) == ("length", 4)
    assert "".join(token.text for token in details.tokens) == REPLY[:4] == answer.generated_text
    assert [token.id for token in details.prefill] == [256, 97, 98]
    assert details.prefill[0].logprob is None
    assert all(len(row) == 2 for row in details.top_tokens)


def test_tgi_stream_is_understood(hub_client):
    """The tokens' texts are the text, and the last event has all of it."""
    assert "".join(hub_client.text_generation("ab", stream=True)) == REPLY
    events = list(hub_client.text_generation("ab", stream=True, details=True, top_n_tokens=1))
    assert [event.index for event in events] == list(range(1, len(REPLY) + 2))
    assert events[-1].generated_text == REPLY
    assert events[-1].details.finish_reason == "eos_token"
    assert events[-1].details.input_length == 3
    assert all(event.details is None for event in events[:-1])


def test_tgi_stop_sequence_ends_the_text(hub_client):
    """A stop string is told as the reason."""
    answer = hub_client.text_generation("ab", stop=["lo"], details=True)
    assert answer.details.finish_reason == "stop_sequence"


def test_tgi_refusals_are_in_its_form(hub_client):
    """What is wrong is status 422 with the field's own name."""
    for fields in ({"best_of": 3}, {"typical_p": 0.5}, {"watermark": True}, {"adapter_id": "a"}):
        with pytest.raises(ValidationError, match=next(iter(fields))):
            hub_client.text_generation("ab", **fields)
    with pytest.raises(ValidationError, match="max_new_tokens"):
        hub_client.text_generation("ab", max_new_tokens=-1)


async def test_tgi_paths_agree(client):
    """/generate, /generate_stream and / are one endpoint in three forms."""
    body = {"inputs": "ab", "parameters": {"max_new_tokens": 3}}
    whole = (await client.post("/generate", json=body)).json()
    assert (await client.post("/", json=body)).json() == [whole]
    streamed = await client.post("/generate_stream", json=body)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert f'"generated_text":"{whole["generated_text"]}"' in streamed.text
    refused = await client.post("/generate", json={**body, "stream": True})
    assert refused.status_code == 422
    assert set(refused.json()) == {"error", "error_type"}
    info = (await client.get("/info")).json()
    assert (info["model_id"], info["max_total_tokens"]) == ("fake", 512)


async def test_tgi_root_needs_a_key():
    """The page at / is for everybody; asking the model there is not."""
    async with connected(FakeEngine(), api_keys=("key",)) as client:
        assert (await client.post("/", json={"inputs": "a"})).status_code == 401


@pytest.mark.parametrize(
    ("grammar", "form", "value"),
    [
        ({"type": "regex", "value": "a+"}, "regex", "a+"),
        ({"type": "json", "value": {"type": "object"}}, "json", {"type": "object"}),
        (
            {"type": "json_schema", "value": {"name": "x", "schema": {"type": "array"}}},
            "json",
            {"type": "array"},
        ),
    ],
)
async def test_tgi_grammar_becomes_the_form_of_the_output(engine, grammar, form, value):
    """The three kinds of grammar that this API has are honoured, none is dropped."""
    async with connected(engine) as client:
        body = {"inputs": "a", "parameters": {"grammar": grammar}}
        assert (await client.post("/generate", json=body)).status_code == 200
    assert getattr(engine.submitted[-1].params.structured_outputs, form) == value


async def test_tgi_grammar_without_a_schema_is_refused_by_its_name(engine):
    """A grammar of the wrong form is 422 and names the field."""
    async with connected(engine) as client:
        grammar = {"type": "json_schema", "value": {"name": "x"}}
        body = {"inputs": "a", "parameters": {"grammar": grammar}}
        answer = await client.post("/generate", json=body)
    assert answer.status_code == 422
    assert "grammar" in answer.json()["error"]
