"""What is refused before a route is reached is told in the form of the API that was asked."""

from __future__ import annotations

import asyncio

import pytest
from asking import connected, error_of
from fake_engine import FakeEngine

MESSAGES = ("/v1/messages", "/v1/messages/count_tokens")
TGI = ("/generate", "/generate_stream", "/")


@pytest.mark.parametrize("path", MESSAGES)
async def test_anthropic_paths_tell_refusals_as_anthropic_does(path):
    """A missing key and a body that is too large reach the client's own exceptions."""
    async with connected(FakeEngine(), api_keys=("secret",), max_body_bytes=100) as client:
        unknown = await client.post(path, json={})
        large = await client.post(path, content=b" " * 101, headers={"x-api-key": "secret"})
    for answer, status, kind in (
        (unknown, 401, "authentication_error"),
        (large, 413, "request_too_large"),
    ):
        assert answer.status_code == status
        assert answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == kind
        assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("path", TGI)
async def test_tgi_paths_tell_refusals_as_tgi_does(path):
    """A missing key and a body that is too large have the two fields of this API."""
    async with connected(FakeEngine(), api_keys=("secret",), max_body_bytes=100) as client:
        unknown = await client.post(path, json={})
        large = await client.post(
            path, content=b" " * 101, headers={"Authorization": "Bearer secret"}
        )
    assert (unknown.status_code, large.status_code) == (401, 413)
    assert large.json()["error_type"] == "validation"
    assert all(set(one.json()) == {"error", "error_type"} for one in (unknown, large))


async def test_other_paths_tell_refusals_as_openai_does():
    """Everything else keeps the form of the OpenAI API."""
    async with connected(FakeEngine(), api_keys=("secret",)) as client:
        assert error_of(await client.post("/v1/completions", json={}), 401)["code"]


@pytest.mark.parametrize(
    ("path", "body", "end"),
    [
        ("/v1/completions", {"prompt": "a"}, '"code":"deadline_exceeded"}}\n\ndata: [DONE]\n\n'),
        (
            "/v1/messages",
            {"model": "fake", "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]},
            '"type":"api_error"',
        ),
    ],
)
async def test_stream_past_its_deadline_ends_in_the_form_of_its_api(path, body, end):
    """The last event of a stream that took too long is one that the client's library reads."""
    async with connected(FakeEngine(hold=asyncio.Event())) as client:
        body = {**body, "stream": True}
        answer = await client.post(path, json=body, headers={"x-request-timeout": "0.2"})
    assert end in answer.text
    assert answer.text.endswith("data: [DONE]\n\n") == (path == "/v1/completions")
