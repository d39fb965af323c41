"""`/v1/completions`: what it asks of the engine, and what it makes of the outputs."""

from __future__ import annotations

import pytest
from asking import connected, error_of, events_of
from fake_engine import BOS_ID, EOS_ID, REPLY, FakeEngine

from quire.core.config import EngineConfig

PATH = "/v1/completions"


async def test_completion_of_text_is_whole(client, engine):
    """The body has the form of the OpenAI API, and nothing is left in the engine."""
    body = (
        await client.post(PATH, json={"model": "fake", "prompt": "ab", "max_tokens": 99})
    ).json()
    assert body["object"] == "text_completion"
    assert body["model"] == "fake"
    assert body["id"].startswith("cmpl-")
    [choice] = body["choices"]
    assert choice["text"] == REPLY
    assert choice["finish_reason"] == "stop"
    assert choice["index"] == 0
    assert choice["logprobs"] is None
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": len(REPLY) + 1,
        "total_tokens": len(REPLY) + 4,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert engine.num_unfinished == 0
    assert engine.aborted == []


async def test_completion_fields_reach_the_engine(client, engine):
    """Every sampling field is handed over under its own name."""
    fields = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.2,
        "seed": 42,
        "stop": ["x", "y"],
        "stop_token_ids": [5],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "max_tokens": 9,
        "min_tokens": 2,
        "prompt_logprobs": 1,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "allowed_token_ids": [1, 2],
        "bad_words": ["z"],
        "truncate_prompt_tokens": 2,
        "cache_salt": "salt",
    }
    body = {"prompt": "abc", "logit_bias": {"7": 1.5}, "logprobs": 2, **fields}
    response = await client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    params = engine.submitted[0].params
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.logit_bias == {7: 1.5}
    assert params.logprobs == 2


async def test_completion_null_fields_mean_defaults(client, engine):
    """A field that is null is a field that was left out."""
    names = (
        "temperature",
        "top_p",
        "n",
        "stop",
        "seed",
        "logit_bias",
        "stream",
        "echo",
        "user",
        "suffix",
    )
    response = await client.post(PATH, json={"prompt": "a", **dict.fromkeys(names)})
    assert response.status_code == 200
    params = engine.submitted[0].params
    assert (params.temperature, params.top_p, params.n, params.max_tokens) == (1.0, 1.0, 1, 16)


async def test_completion_model_defaults_fill_what_is_left_open():
    """What a model's authors recommend counts unless the request says otherwise."""
    engine = FakeEngine(default_sampling={"temperature": 0.6, "top_k": 20, "max_tokens": 3})
    async with connected(engine) as client:
        await client.post(PATH, json={"prompt": "a", "top_k": 5})
    params = engine.submitted[0].params
    assert (params.temperature, params.top_k, params.max_tokens) == (0.6, 5, 16)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[BOS_ID, 97, 98]]),
        (["ab", "c"], [[BOS_ID, 97, 98], [BOS_ID, 99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
async def test_completion_prompt_forms(client, prompt, expected):
    """Texts and token ids, one or several, are prompts; each has its choice, in order."""
    body = {"prompt": prompt, "return_token_ids": True, "max_tokens": 2}
    choices = (await client.post(PATH, json=body)).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == expected
    assert [choice["index"] for choice in choices] == list(range(len(expected)))
    assert all(choice["token_ids"] == list(b"He") for choice in choices)


async def test_completion_add_special_tokens_false_is_handed_over(client):
    """A prompt that brings its own special tokens gets no second ones."""
    body = {"prompt": "a", "add_special_tokens": False, "return_token_ids": True}
    choice = (await client.post(PATH, json=body)).json()["choices"][0]
    assert choice["prompt_token_ids"] == [97]


async def test_completion_n_numbers_choices_by_prompt_then_output():
    """Choice i * n + j is output j of prompt i."""
    engine = FakeEngine(reply=lambda ids, index: f"{chr(ids[-1])}{index}")
    async with connected(engine) as client:
        body = {"prompt": ["a", "b"], "n": 2}
        choices = (await client.post(PATH, json=body)).json()["choices"]
        streamed = events_of(await client.post(PATH, json={**body, "stream": True}))
    assert [choice["text"] for choice in choices] == ["a0", "a1", "b0", "b1"]
    texts = dict.fromkeys(range(4), "")
    for event in streamed:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == ["a0", "a1", "b0", "b1"]


async def test_completion_usage_counts_each_prompt_once(client):
    """n outputs of one prompt pay for the prompt once."""
    usage = (await client.post(PATH, json={"prompt": "ab", "n": 3, "max_tokens": 2})).json()[
        "usage"
    ]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 6)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"echo": True},
        {"echo": True, "logprobs": 1},
        {"logprobs": 2, "return_token_ids": True},
        {"stop": "wor"},
        {"stop": "wor", "include_stop_str_in_output": True},
        {"max_tokens": 3},
        {"max_tokens": 0, "echo": True, "logprobs": 1},
        {"max_tokens": 0},
        {"prompt_logprobs": 2},
        {"n": 2, "echo": True, "logprobs": 1},
        {"n": 2, "prompt_logprobs": 1, "return_token_ids": True},
    ],
    ids=str,
)
async def test_completion_stream_says_what_the_whole_says(client, fields):
    """Joined, the chunks of a stream are the answer that comes without streaming."""
    body = {"prompt": "héy", "max_tokens": 30, **fields}
    whole = (await client.post(PATH, json=body)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = events_of(await client.post(PATH, json={**body, **options}))
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    assert len({event["id"] for event in events}) == 1
    for choice in whole["choices"]:
        parts = [c for e in events for c in e["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [
            choice["finish_reason"]
        ]
        assert parts[-1]["stop_reason"] == choice["stop_reason"]
        assert parts[0].get("prompt_logprobs") == choice.get("prompt_logprobs")
        assert all("prompt_logprobs" not in part for part in parts[1:])
        if choice["logprobs"] is not None:
            for column, values in choice["logprobs"].items():
                assert [v for part in parts for v in part["logprobs"][column]] == values, column
        if "token_ids" in choice:
            assert [t for part in parts for t in part["token_ids"]] == choice["token_ids"]


async def test_completion_stream_without_usage_says_nothing_of_it(client):
    """Usage comes only where it was asked for."""
    events = events_of(await client.post(PATH, json={"prompt": "a", "stream": True}))
    assert all("usage" not in event for event in events)


async def test_completion_stream_continuous_usage_grows(client):
    """Each chunk carries the usage so far."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "a", "stream": True, "stream_options": options, "max_tokens": 5}
    counts = [
        e["usage"]["completion_tokens"] for e in events_of(await client.post(PATH, json=body))
    ]
    assert counts == [1, 2, 3, 4, 5, 5]


async def test_completion_echo_of_token_ids_is_decoded(client):
    """An echoed prompt of token ids is shown as text."""
    choice = (await client.post(PATH, json={"prompt": [97, 98], "echo": True})).json()["choices"][0]
    assert choice["text"] == "ab" + REPLY


async def test_completion_echo_of_a_cut_prompt_shows_what_the_model_read(client):
    """What truncate_prompt_tokens cut off is not echoed."""
    body = {"prompt": "abcd", "echo": True, "truncate_prompt_tokens": 2, "max_tokens": 1}
    choice = (await client.post(PATH, json=body)).json()["choices"][0]
    assert choice["text"] == "cdH"


async def test_completion_logprobs_columns_agree(client):
    """One entry a token, the chosen one among the top, offsets at the tokens' places in the text."""
    body = {
        "prompt": "ab",
        "logprobs": 2,
        "echo": True,
        "max_tokens": 2,
        "add_special_tokens": False,
    }
    choice = (await client.post(PATH, json=body)).json()["choices"][0]
    columns = choice["logprobs"]
    assert columns["tokens"] == ["a", "b", "H", "e"]
    assert columns["token_logprobs"] == [None, -1.0, -1.0, -1.0]
    assert columns["text_offset"] == [0, 1, 2, 3]
    assert columns["top_logprobs"][0] is None
    assert columns["top_logprobs"][2] == {"I": -0.5, "H": -1.0}
    for token, offset in zip(columns["tokens"], columns["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)


async def test_completion_logprobs_zero_tells_the_chosen_alone(client):
    """logprobs=0 is a wish, not its absence."""
    body = {"prompt": "a", "logprobs": 0, "max_tokens": 1}
    columns = (await client.post(PATH, json=body)).json()["choices"][0]["logprobs"]
    assert columns["top_logprobs"] == [{"H": -1.0}]


async def test_completion_logprobs_minus_infinity_is_written_as_a_number():
    """JSON has no infinity; the lowest number stands for it."""
    # The likeliest neighbour of "@" is "A", which the fake engine gives no chance at all.
    async with connected(FakeEngine(reply=lambda ids, index: "@")) as client:
        body = {"prompt": "a", "logprobs": 3, "max_tokens": 1}
        columns = (await client.post(PATH, json=body)).json()["choices"][0]["logprobs"]
    assert columns["top_logprobs"][0]["A"] == -9999.0


async def test_completion_tokens_as_ids(client):
    """return_tokens_as_token_ids names tokens by their ids."""
    body = {"prompt": "a", "logprobs": 1, "max_tokens": 1, "return_tokens_as_token_ids": True}
    columns = (await client.post(PATH, json=body)).json()["choices"][0]["logprobs"]
    assert columns["tokens"] == ["token_id:72"]
    assert set(columns["top_logprobs"][0]) == {"token_id:73", "token_id:72"}


async def test_completion_max_tokens_zero_generates_nothing(client):
    """The prompt's log-probabilities can be had without an output."""
    body = {"prompt": "ab", "max_tokens": 0, "echo": True, "logprobs": 1, "return_token_ids": True}
    answer = (await client.post(PATH, json=body)).json()
    [choice] = answer["choices"]
    assert choice["text"] == "ab"
    assert choice["token_ids"] == []
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["<256>", "a", "b"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]
    assert answer["usage"]["completion_tokens"] == 0


async def test_completion_stop_string_ends_and_is_named(client):
    """The text ends before the stop string, which is told as the reason."""
    choice = (await client.post(PATH, json={"prompt": "a", "stop": ["zz", "lo"]})).json()[
        "choices"
    ][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Hel", "stop", "lo")


async def test_completion_end_token_counts_but_is_not_text(client):
    """The end-of-sequence token is among the ids and not in the text."""
    body = {"prompt": "a", "max_tokens": 50, "return_token_ids": True}
    choice = (await client.post(PATH, json=body)).json()["choices"][0]
    assert choice["token_ids"][-1] == EOS_ID
    assert choice["text"] == REPLY


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"suffix": "x"}, "suffix", "suffix"),
        ({"best_of": 3}, "best_of", "best_of"),
        ({"use_beam_search": True}, "use_beam_search", "use_beam_search"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "response_format"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "guided_regex"),
        ({"nonsense": 1}, "nonsense", "nonsense"),
        ({"temperature": -1}, "temperature", "temperature"),
        ({"temperature": "1"}, "temperature", "temperature"),
        ({"top_p": 0}, "top_p", "top_p"),
        ({"n": 0}, "n", "n"),
        ({"n": 10**30}, "n", "n"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens"),
        ({"max_tokens": True}, "max_tokens", "max_tokens"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "20"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "logit_bias"),
        ({"logit_bias": {"999": 1}}, "prompt", "999"),
        ({"stop": [""]}, "stop", "stop"),
        ({"stop": ["x"] * 129}, "stop", "128"),
        ({"bad_words": ["x"] * 1025}, "bad_words", "1024"),
        ({"min_tokens": 99}, "min_tokens", "min_tokens"),
        ({"min_tokens": 1, "max_tokens": 0}, "min_tokens", "min_tokens"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "x"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[1], "a"]}, "prompt", "token ids"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": [-1]}, "prompt", "token ids"),
        ({"prompt": [10**9]}, "prompt", "vocabulary"),
        ({"prompt": "x" * 600}, "prompt", "tokens"),
        ({"logits_processors": ["nope"]}, "logits_processors", "processor"),
        ({"request_id": "a b"}, "request_id", "request_id"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_completion_bad_field_is_refused_by_name(client, engine, fields, param, word):
    """Whoever asks what is not served reads the field's name, whether he streams or not."""
    for stream in ({}, {"stream": True}):
        error = error_of(await client.post(PATH, json={"prompt": "a", **stream, **fields}), 400)
        assert error["param"] == param
        assert word in error["message"]
        assert error["type"] == "invalid_request_error"
    assert engine.num_unfinished == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": ""},
        {"best_of": 1},
        {"best_of": 2, "n": 2},
        {"user": "me"},
        {"metadata": {"a": "b"}},
        {"response_format": {"type": "text"}},
        {"use_beam_search": False},
        {"stream_options": None},
    ],
    ids=str,
)
async def test_completion_fields_that_ask_for_nothing_are_accepted(client, fields):
    """Clients send defaults of things that are not served; that is no reason to refuse them."""
    response = await client.post(PATH, json={"prompt": "a", **fields})
    assert response.status_code == 200, response.text


async def test_completion_stream_options_without_stream_are_refused(client):
    """Options of a stream that does not come are a misunderstanding."""
    body = {"prompt": "a", "stream_options": {"include_usage": True}}
    assert error_of(await client.post(PATH, json=body), 400)["param"] == "stream_options"


async def test_completion_too_many_outputs_are_refused():
    """One request cannot fill the server's memory with prompts, nor with outputs of one."""
    async with connected(FakeEngine(), max_outputs=4) as client:
        assert (
            error_of(await client.post(PATH, json={"prompt": ["a"] * 5}), 400)["param"] == "prompt"
        )
        body = {"prompt": ["a"] * 2, "n": 3}
        assert error_of(await client.post(PATH, json=body), 400)["param"] == "n"
        assert (await client.post(PATH, json={**body, "n": 2})).status_code == 200


async def test_completion_priority_needs_the_policy_that_honours_it():
    """Where requests go in order of arrival, a priority is refused and not dropped."""
    async with connected(FakeEngine()) as client:
        assert (
            error_of(await client.post(PATH, json={"prompt": "a", "priority": 1}), 400)["param"]
            == "priority"
        )
        assert (await client.post(PATH, json={"prompt": "a", "priority": 0})).status_code == 200
    engine = FakeEngine(config=EngineConfig(model="fake", scheduling_policy="priority"))
    async with connected(engine) as client:
        assert (await client.post(PATH, json={"prompt": "a", "priority": -5})).status_code == 200
    assert engine.submitted[0].params.priority == -5


async def test_completion_one_bad_prompt_of_several_runs_none(client, engine):
    """All prompts are taken or none; what was submitted before the bad one is ended."""
    error_of(
        await client.post(PATH, json={"prompt": ["a", "b", ""], "add_special_tokens": False}), 400
    )
    assert engine.num_unfinished == 0
    assert len(engine.aborted) == 2
