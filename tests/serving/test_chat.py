"""`/v1/chat/completions`: messages to a prompt, and outputs to messages."""

from __future__ import annotations

import pytest
from asking import connected, error_of, events_of
from fake_engine import REPLY, FakeEngine, decode

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}


async def prompt_for(client, engine, **fields) -> str:
    response = await client.post(PATH, json={"messages": [USER], **fields})
    assert response.status_code == 200, response.text
    assert engine.submitted[-1].add_special_tokens is False
    return engine.submitted[-1].prompt


async def test_chat_answer_is_whole(client):
    """The body has the form of the OpenAI API."""
    body = (await client.post(PATH, json={"model": "fake", "messages": [USER]})).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": REPLY, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len(REPLY) + 1


async def test_chat_messages_become_a_prompt(client, engine):
    """Roles, parts and names reach the template; special tokens are the template's affair."""
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": [], "audio": None},
        {"role": "user", "content": "d", "name": "eve"},
    ]
    prompt = await prompt_for(client, engine, messages=messages)
    assert prompt == "<system>be kind\n<user>a\nb\n<assistant>c\n<user>d\n<assistant>"


async def test_chat_continue_final_message_leaves_the_turn_open(client, engine):
    """The last message is continued, and no new turn begins."""
    messages = [USER, {"role": "assistant", "content": "Sure"}]
    prompt = await prompt_for(client, engine, messages=messages, continue_final_message=True)
    assert prompt.endswith("<assistant>Sure")


async def test_chat_template_variables_reach_the_template(client, engine):
    """chat_template_kwargs are the template's variables."""
    prompt = await prompt_for(client, engine, chat_template_kwargs={"enable_thinking": False})
    assert "[enable_thinking=False]" in prompt


async def test_chat_template_of_a_request_needs_trust():
    """A template is a program: clients bring one only where the server was told to run it."""
    body = {"messages": [USER], "chat_template": "T"}
    async with connected(FakeEngine()) as client:
        error = error_of(await client.post(PATH, json=body), 400)
        assert error["param"] == "chat_template"
        assert "--trust-request-chat-template" in error["message"]
    engine = FakeEngine()
    async with connected(engine, trust_request_chat_template=True) as client:
        assert (await prompt_for(client, engine, chat_template="T")).startswith("T")
        error_of(await client.post(PATH, json={**body, "chat_template": "broken"}), 400)


async def test_chat_max_tokens_by_either_name(client, engine):
    """Both names count; without one the context is the limit."""
    for fields, expected in (
        ({}, None),
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 4, "max_completion_tokens": 4}, 4),
    ):
        await prompt_for(client, engine, **fields)
        assert engine.submitted[-1].params.max_tokens == expected


async def test_chat_stream_begins_with_roles_and_says_what_the_whole_says():
    """One role chunk a choice comes first; joined, the chunks are the whole answer."""
    engine = FakeEngine(reply=lambda ids, index: f"answer {index} ä€𝄞")
    async with connected(engine) as client:
        body = {
            "messages": [USER],
            "n": 2,
            "logprobs": True,
            "top_logprobs": 1,
            "return_token_ids": True,
        }
        whole = (await client.post(PATH, json=body)).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        events = events_of(await client.post(PATH, json={**body, **options}))
    assert all(event["object"] == "chat.completion.chunk" for event in events)
    for index, event in enumerate(events[:2]):
        [choice] = event["choices"]
        assert choice["index"] == index
        assert choice["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in c["delta"] for e in events[2:] for c in e["choices"])
    assert events[-1]["usage"] == whole["usage"]
    assert events[2]["prompt_token_ids"] == whole["prompt_token_ids"]
    for choice in whole["choices"]:
        parts = [c for e in events for c in e["choices"] if c["index"] == choice["index"]]
        text = "".join(part["delta"].get("content", "") for part in parts)
        assert text == choice["message"]["content"] == f"answer {choice['index']} ä€𝄞"
        tokens = [t for part in parts if part["logprobs"] for t in part["logprobs"]["content"]]
        assert tokens == choice["logprobs"]["content"]
        assert [part["finish_reason"] for part in parts][-1] == choice["finish_reason"]
        assert [t for part in parts for t in part.get("token_ids", [])] == choice["token_ids"]


async def test_chat_logprobs_tell_tokens_bytes_and_rivals(client):
    """Each token comes with its bytes and as many rivals as asked, the likeliest first."""
    body = {"messages": [USER], "logprobs": True, "top_logprobs": 2, "max_tokens": 1}
    [token] = (await client.post(PATH, json=body)).json()["choices"][0]["logprobs"]["content"]
    assert (token["token"], token["logprob"], token["bytes"]) == ("H", -1.0, [72])
    assert [rival["token"] for rival in token["top_logprobs"]] == ["I", "H"]


async def test_chat_logprobs_without_rivals(client):
    """logprobs alone tells the chosen tokens and an empty list of rivals."""
    body = {"messages": [USER], "logprobs": True, "max_tokens": 2}
    tokens = (await client.post(PATH, json=body)).json()["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in tokens] == ["H", "e"]
    assert all(token["top_logprobs"] == [] for token in tokens)


async def test_chat_prompt_logprobs_stand_beside_the_choices(client):
    """Whole or streamed, the prompt's log-probabilities come once."""
    body = {"messages": [USER], "prompt_logprobs": 1, "max_tokens": 2}
    whole = (await client.post(PATH, json=body)).json()
    events = events_of(await client.post(PATH, json={**body, "stream": True}))
    found = [e["prompt_logprobs"] for e in events if "prompt_logprobs" in e]
    assert found == [whole["prompt_logprobs"]]
    assert whole["prompt_logprobs"][0] is None
    assert len(whole["prompt_logprobs"]) == whole["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"store": True}, "store"),
        ({"store": 0}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"echo": True}, "echo"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"max_completion_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
        ),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"prompt": "x"}, "prompt"),
    ],
    ids=str,
)
async def test_chat_bad_field_is_refused_by_name(client, engine, fields, param):
    """Whoever asks what is not served reads the field's name."""
    error = error_of(await client.post(PATH, json={"messages": [USER], **fields}), 400)
    assert error["param"] == param
    assert engine.submitted == []


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"parallel_tool_calls": True},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"store": False, "metadata": {}, "user": "me", "service_tier": "auto"},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
    ],
    ids=str,
)
async def test_chat_fields_that_ask_for_nothing_are_accepted(client, fields):
    """Clients send defaults of things that are not served; that is no reason to refuse them."""
    response = await client.post(PATH, json={"messages": [USER], **fields})
    assert response.status_code == 200, response.text


async def test_tokenize_and_detokenize_are_inverse(client):
    """What /tokenize cuts, /detokenize joins."""
    cut = (await client.post("/tokenize", json={"prompt": "héy", "return_token_strs": True})).json()
    assert cut["count"] == len(cut["tokens"]) == len(cut["token_strs"])
    assert cut["max_model_len"] == 512
    body = {"tokens": cut["tokens"], "skip_special_tokens": True}
    assert (await client.post("/detokenize", json=body)).json() == {"prompt": "héy"}


async def test_tokenize_chat_is_what_the_model_reads(client, engine):
    """A conversation is cut as chat/completions cuts it."""
    await prompt_for(client, engine)
    cut = (await client.post("/tokenize", json={"messages": [USER]})).json()
    assert decode(cut["tokens"]) == engine.submitted[-1].prompt


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 1}),
        ("/tokenize", {"prompt": "a", "x": 1}),
        ("/tokenize", {"messages": "a"}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/detokenize", {"tokens": [10**12]}),
        ("/detokenize", {"tokens": [9999]}),
    ],
)
async def test_tokens_bad_body_is_refused(client, path, body):
    """Bad input is the client's error."""
    error_of(await client.post(path, json=body), 400)
