"""The whole house: `quire serve` on a tiny random model, asked by the API's own client library."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import httpx
import jsonschema
import openai
import psutil
import pytest
from pydantic import BaseModel, ConfigDict
from tiny_models import make_tiny_model

from quire.core.engine.llm import LLM
from quire.core.sampling_params import SamplingParams

pytestmark = pytest.mark.timeout(240)

PROMPTS = ("Once upon a time", "The quick brown fox", "x = 1\ny =", "héllo wörld")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("served") / "llama")


@contextmanager
def quire_serve(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server process and its address. Kills what is left of it at the end."""
    command = [sys.executable, "-m", "quire", "serve", str(model), "--port", "0"]
    settings = ("--served-model-name", "tiny", "--cache-memory-bytes", "8M", *options)
    with subprocess.Popen([*command, *settings], stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, _address(process)
        finally:
            _kill(process)


def _address(process: subprocess.Popen) -> str:
    lines = []
    for line in process.stderr:
        if line.startswith("serving tiny at "):
            return line.split()[-1]
        lines.append(line)
    raise AssertionError("".join(lines))


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()


@pytest.fixture(scope="module")
def address(model) -> Iterator[str]:
    with quire_serve(model) as (_, address):
        yield address


@pytest.fixture(scope="module")
def client(address) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=address, api_key="any", max_retries=0, timeout=60) as client:
        yield client


def complete(client: openai.OpenAI, prompt: str, **fields) -> str:
    answer = client.completions.create(
        model="tiny",
        prompt=prompt,
        temperature=0,
        max_tokens=16,
        extra_body={"ignore_eos": True},
        **fields,
    )
    if fields.get("stream"):
        return "".join(chunk.choices[0].text for chunk in answer)
    return answer.choices[0].text


@pytest.fixture(scope="module")
def expected(model) -> dict[str, str]:
    """What the offline engine says."""
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    with LLM(str(model), cache_memory_bytes=8 * 2**20) as llm:
        outputs = llm.generate(list(PROMPTS), params, use_tqdm=False)
    return {prompt: output.outputs[0].text for prompt, output in zip(PROMPTS, outputs, strict=True)}


def test_served_greedy_is_the_offline_engines(client, expected):
    """Over HTTP, alone or among others, whole or streamed, greedy answers are those of the LLM."""
    for prompt in PROMPTS:
        assert complete(client, prompt) == expected[prompt]
        assert complete(client, prompt, stream=True) == expected[prompt]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda prompt: complete(client, prompt, stream=True), PROMPTS * 3))
    assert texts == [expected[prompt] for prompt in PROMPTS * 3]


def test_served_token_ids_and_text_are_one_prompt(client, address, expected):
    """A prompt may come as the ids that /tokenize gives for it."""
    base = address.removesuffix("/v1")
    for prompt in PROMPTS:
        ids = httpx.post(f"{base}/tokenize", json={"prompt": prompt}).json()["tokens"]
        assert complete(client, ids) == expected[prompt]


def test_served_chat_streams_what_it_says_whole(client):
    """A conversation goes through the model's template, and both ways of answering agree."""
    fields = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "seed": 7,
        "max_tokens": 12,
        "logprobs": True,
        "top_logprobs": 2,
        "n": 2,
    }
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True))
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        tokens = [t.token for part in parts if part.logprobs for t in part.logprobs.content]
        assert tokens == [token.token for token in choice.logprobs.content]
        assert all(t.logprob <= 0 for t in choice.logprobs.content)
        assert all(len(t.top_logprobs) == 2 for t in choice.logprobs.content)


def test_served_echo_logprobs_are_the_prompts(client):
    """The prompt's log-probabilities come without an output, one for each token but the first."""
    answer = client.completions.create(
        model="tiny", prompt="Once upon", echo=True, logprobs=1, max_tokens=0
    )
    columns = answer.choices[0].logprobs
    assert answer.choices[0].text == "Once upon"
    assert columns.token_logprobs[0] is None
    assert all(number < 0 for number in columns.token_logprobs[1:])
    assert len(columns.tokens) == answer.usage.prompt_tokens


def test_served_bad_requests_do_no_harm(client, expected):
    """What is refused is refused by name, and the next answer is as good as before."""
    for fields in (
        {"prompt": [10**6]},
        {"prompt": "x" * 100_000},
        {"prompt": []},
        {"prompt": "a", "logit_bias": {"999999": 1}},
        {"prompt": "a", "extra_body": {"logits_processors": ["none"]}},
        {"prompt": "a", "seed": 2**70},
    ):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", **fields)
    assert complete(client, PROMPTS[0]) == expected[PROMPTS[0]]


def test_served_metrics_and_disconnect(client, address):
    """A client that leaves frees the engine, and the metrics show it."""
    base = address.removesuffix("/v1")

    def running() -> float:
        text = httpx.get(f"{base}/metrics").text
        [line] = [t for t in text.splitlines() if t.startswith("quire:num_requests_running{")]
        return float(line.rsplit(" ", 1)[1])

    with client.completions.create(
        model="tiny", prompt="a", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    give_up = time.monotonic() + 20
    while running():
        assert time.monotonic() < give_up, "the request still runs"
    assert 'finished_reason="abort"' in httpx.get(f"{base}/metrics").text


def test_served_process_ends_with_zero_and_no_children(model):
    """SIGTERM in the middle of an answer: it is finished, the status is 0 and no process is left."""
    with quire_serve(model) as (process, address):
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        body = {"prompt": "a", "max_tokens": 60, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{address}/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = "".join(lines)
        assert '"finish_reason":"length"' in rest
        assert rest.endswith("data: [DONE]")
        assert process.wait(30) == 0
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []


def test_serve_of_a_model_that_is_not_there_is_one_message(tmp_path):
    """A start that fails ends with a status and a message, without a traceback."""
    command = [sys.executable, "-m", "quire", "serve", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("quire: error:"), done.stderr


MOVES = [
    {
        "type": "function",
        "function": {
            "name": "move",
            "parameters": {
                "type": "object",
                "properties": {
                    "to": {"$ref": "#/$defs/square"},
                    "steps": {"type": "integer", "minimum": 0, "maximum": 9},
                },
                "required": ["to", "steps"],
                "additionalProperties": False,
                "$defs": {"square": {"type": "string", "pattern": "^[a-h][1-8]$"}},
            },
        },
    },
    {"type": "function", "function": {"name": "wait"}},
]


class Position(BaseModel):
    """A form of answer, from which the library makes a schema."""

    model_config = ConfigDict(extra="forbid")

    is_check: bool
    side: Literal["white", "black"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "move"}}])
def test_served_obliged_calls_fit_their_tools(client, choice, temperature, stream):
    """A model of random weights calls only tools that there are, with arguments that fit."""
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Go on."}],
        tools=MOVES,
        tool_choice=choice,
        parallel_tool_calls=False,
        temperature=temperature,
        seed=5,
        max_tokens=200,
        stream=stream,
    )
    if stream:
        chunks = [choice for chunk in answer for choice in chunk.choices]
        calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        name = "".join(call.function.name or "" for call in calls)
        arguments = "".join(call.function.arguments or "" for call in calls)
        assert chunks[-1].finish_reason == "tool_calls"
    else:
        [call] = answer.choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
        assert answer.choices[0].finish_reason == "tool_calls"
    assert name in (("move", "wait") if choice == "required" else ("move",))
    schema = next(
        t["function"].get("parameters", {}) for t in MOVES if t["function"]["name"] == name
    )
    jsonschema.validate(json.loads(arguments), schema)


def test_served_answer_of_a_form_is_parsed_by_the_library(client):
    """`chat.completions.parse` gets an object of its class from a model of random weights."""
    answer = client.chat.completions.parse(
        model="tiny",
        messages=[{"role": "user", "content": "How does it stand?"}],
        response_format=Position,
        max_tokens=200,
        n=3,
    )
    for choice in answer.choices:
        assert choice.message.parsed.side in ("white", "black")


def test_served_grammar_that_cannot_be_compiled_is_refused_with_the_reason(client):
    """The client reads why, and nothing reaches the engine."""
    for schema, reason in (({"uniqueItems": True}, "uniqueItems"), ({"type": "strin"}, "strin")):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        with pytest.raises(openai.BadRequestError, match=reason) as caught:
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "x"}], response_format=form
            )
        assert caught.value.param == "structured_outputs.json"
