"""The client library of the OpenAI API, against the real server over a real connection."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from asking import served_in_thread
from fake_engine import REPLY, FakeEngine

KEY = "the-key"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server in a thread of this process."""
    with served_in_thread(FakeEngine(), api_keys=(KEY,)) as address:
        yield f"{address}/v1"


@pytest.fixture
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


MESSAGES = [{"role": "user", "content": "hi"}]


def test_openai_chat_is_understood(client):
    """The library reads answer, reasons, log-probabilities and usage."""
    answer = client.chat.completions.create(
        model="fake", messages=MESSAGES, logprobs=True, top_logprobs=1, n=2, user="me"
    )
    assert [choice.message.content for choice in answer.choices] == [REPLY] * 2
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].bytes == [73]
    assert answer.usage.prompt_tokens_details.cached_tokens > 0


def test_openai_chat_stream_is_understood(client):
    """The library joins the stream to the answer and finds the usage at its end."""
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == REPLY
    assert chunks[-1].usage.completion_tokens == len(REPLY) + 1


def test_openai_conversation_goes_on_with_the_answer(client):
    """An answer, put back into the conversation as the library has it, is accepted."""
    first = client.chat.completions.create(model="fake", messages=MESSAGES).choices[0].message
    messages = [*MESSAGES, first, {"role": "user", "content": "more"}]
    again = client.chat.completions.create(model="fake", messages=messages)
    assert again.choices[0].message.content == REPLY


def test_openai_completions_are_understood(client):
    """Texts and token ids, whole and streamed, with vLLM's extra fields in extra_body."""
    for prompt in ("ab", [97, 98], ["ab", "c"], [[97], [98]]):
        answer = client.completions.create(
            model="fake",
            prompt=prompt,
            logprobs=1,
            extra_body={"top_k": 3, "return_token_ids": True},
        )
        assert {choice.text for choice in answer.choices} == {REPLY}
        assert answer.choices[0].logprobs.token_logprobs[0] == -1.0
        assert answer.choices[0].token_ids[0] == ord("H")
    stream = client.completions.create(model="fake", prompt="ab", stream=True, echo=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "ab" + REPLY


def test_openai_errors_have_their_types(client, url):
    """The library raises the exception that belongs to each refusal, with field and code."""
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="fake", messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="fake", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
    with (
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_openai_models_are_listed(client):
    """The library finds the model by its list and by its name."""
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "quire"


async def test_openai_many_at_once(url):
    """Many streams at once do not mix."""
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as client:

        async def one(text: str) -> str:
            stream = await client.completions.create(
                model="fake", prompt=text, echo=True, stream=True, max_tokens=1
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = [f"prompt {number} " for number in range(20)]
        assert await asyncio.gather(*map(one, texts)) == [text + "H" for text in texts]
