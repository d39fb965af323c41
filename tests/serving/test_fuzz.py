"""Whatever a client sends, the fault is never the server's."""

from __future__ import annotations

import asyncio
import json

from asking import connected
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.core.serving.protocol.chat import ChatRequest
from quire.core.serving.protocol.completions import CompletionRequest

NUMBERS = st.integers(-(2**70), 2**70) | st.integers(-3, 12) | st.floats()
TEXTS = st.text(max_size=8) | st.sampled_from(["a", "user", "assistant", "system", "text"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
PARTS = st.fixed_dictionaries({"type": st.just("text") | TEXTS, "text": TEXTS})
GOOD_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS}
)
ODD_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["developer", "user", "tool"])},
    optional={"content": TEXTS | st.lists(PARTS, max_size=2), "name": TEXTS, "x": ANYTHING},
)
MESSAGES = st.lists(GOOD_MESSAGE, min_size=1, max_size=3) | st.lists(ODD_MESSAGE, max_size=2)
PROMPTS = (
    TEXTS
    | st.lists(TEXTS, max_size=3)
    | st.lists(st.integers(-1, 300), max_size=4)
    | st.lists(st.lists(st.integers(-1, 300), max_size=3), max_size=3)
)
SMALL = st.integers(-1, 5)
LIKELY = {
    "temperature": st.floats(0, 2),
    "max_tokens": SMALL,
    "n": SMALL,
    "logprobs": SMALL | st.booleans(),
    "top_logprobs": SMALL,
    "prompt_logprobs": SMALL,
    "stop": TEXTS | st.lists(TEXTS, max_size=2),
    "stream": st.booleans(),
    "echo": st.booleans(),
    "seed": st.integers(),
    "logit_bias": st.dictionaries(st.integers(-1, 300).map(str) | TEXTS, NUMBERS, max_size=2),
    "return_token_ids": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "continue_final_message": st.booleans(),
}


def bodies(model, own: dict) -> st.SearchStrategy:
    """Bodies in which each field is likely, unlikely or absent, and sometimes one that nobody knows."""
    names = {*model.model_fields, *model.neutral_values} - set(own)
    optional = {name: LIKELY.get(name, st.none() | ANYTHING) for name in names}
    optional["model"] = st.sampled_from(["fake", None, "other"])
    optional["unknown"] = ANYTHING
    # Few fields at a time: of many random ones some is always wrong, and nothing would be answered.
    chosen = st.lists(st.sampled_from(sorted(optional)), max_size=5, unique=True)
    required = st.fixed_dictionaries(own)
    extra = chosen.flatmap(lambda picked: st.fixed_dictionaries({n: optional[n] for n in picked}))
    return st.builds(lambda a, b: {**b, **a}, required, extra)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(
        st.tuples(st.just("/v1/completions"), bodies(CompletionRequest, {"prompt": PROMPTS}))
        | st.tuples(st.just("/v1/chat/completions"), bodies(ChatRequest, {"messages": MESSAGES}))
        | st.tuples(st.sampled_from(["/tokenize", "/detokenize", "/v1/completions"]), ANYTHING),
        min_size=1,
        max_size=4,
    )
)
def test_any_body_is_answered_or_refused(requests):
    """Every body gets an answer or an error of the API below 500, and leaves no request behind."""

    async def ask() -> None:
        engine = FakeEngine(reply=lambda ids, index: "ok")
        async with connected(engine, trust_request_chat_template=True) as client:
            for path, body in requests:
                response = await client.post(path, content=json.dumps(body))
                assert response.status_code in {200, 400, 404}, (path, body, response.text)
                if response.status_code != 200:
                    assert set(response.json()) == {"error"}
                elif response.headers["content-type"].startswith("text/event-stream"):
                    assert response.text.endswith("data: [DONE]\n\n")
                    assert '"error"' not in response.text
        assert engine.num_unfinished == 0

    asyncio.run(ask())


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=60), path=st.sampled_from(["/v1/completions", "/tokenize"]))
def test_any_bytes_are_answered_or_refused(content, path):
    """Bytes that are no JSON are the client's error too."""

    async def ask() -> int:
        async with connected(FakeEngine()) as client:
            return (await client.post(path, content=content)).status_code

    assert asyncio.run(ask()) in {200, 400, 404}
