"""Chunks that are encoded once and filled with text many times."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from asking import connected
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st

from quire.core.serving.answers.plain_chunks import PlainChunks

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(texts=st.lists(st.tuples(st.integers(0, 3), TEXTS)), answer_id=TEXTS)
def test_plain_chunk_of_any_text_equals_the_json_of_the_whole_body(texts, answer_id):
    """Whatever the model says and whatever a client calls its request, the JSON is that of a body."""

    def make(index: int, text: str) -> bytes:
        return json.dumps({"id": answer_id, "choices": [{"index": index, "text": text}]}).encode()

    plain = PlainChunks(make)
    for index, text in texts:
        assert json.loads(plain.body(index, text)) == json.loads(make(index, text))


async def _chunks(path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with connected(FakeEngine()) as client:
        text = (await client.post(path, json={**body, "stream": True})).text
    return [json.loads(line) for line in re.findall(r"^data: (\{.*)$", text, re.MULTILINE)]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "one two", "max_tokens": 6}),
        ("/v1/completions", {"prompt": "one two", "max_tokens": 6, "n": 2}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "one"}], "max_tokens": 6, "n": 2},
        ),
    ],
)
async def test_plain_chunks_equal_those_of_a_stream_that_tells_more(path, body):
    """The short way and the long way of writing a chunk differ in what was asked and nothing else."""
    body = {**body, "request_id": "same"}
    usage = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    short = await _chunks(path, body)
    long = await _chunks(path, {**body, **usage})
    shown = [chunk for chunk in long if chunk["choices"]]
    for chunk in (*short, *shown):
        chunk.pop("usage", None)
        chunk.pop("created")
    assert len(short) >= 6
    assert sorted(map(json.dumps, short)) == sorted(map(json.dumps, shown))
