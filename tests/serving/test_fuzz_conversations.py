"""Whatever a client puts into the free parts of Responses and messages, the fault is never the server's."""

from __future__ import annotations

import asyncio
import json

from asking import connected
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
KINDS = st.sampled_from(
    [
        *("message", "function_call", "function_call_output", "reasoning", "input_text", "text"),
        *("tool_use", "tool_result", "thinking", "function", "auto", "any", "tool", "enabled"),
        *("json_schema", "custom", "none", "required"),
    ]
)
NAMES = st.sampled_from(
    [
        *("type", "role", "content", "text", "id", "call_id", "name", "arguments", "output"),
        *("input", "tool_use_id", "function", "schema", "input_schema", "parameters", "format"),
        *("budget_tokens", "effort", "disable_parallel_tool_use"),
    ]
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool"])
LOOSE = st.recursive(
    ANYTHING | KINDS,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(NAMES, inner | KINDS, max_size=4)
        | st.fixed_dictionaries({"type": KINDS}, optional={"text": inner, "content": inner})
    ),
    max_leaves=6,
)
OBJECTS = st.dictionaries(NAMES, LOOSE, max_size=4) | st.fixed_dictionaries(
    {"type": KINDS | LOOSE}, optional={"role": ROLES, "content": LOOSE, "output": LOOSE}
)
TURNS = st.fixed_dictionaries({"role": ROLES, "content": LOOSE | st.lists(OBJECTS, max_size=3)})
SHARED = {
    "tools": st.lists(OBJECTS, max_size=2),
    "tool_choice": OBJECTS | KINDS,
    "stream": st.booleans(),
}
RESPONSES = st.fixed_dictionaries(
    {"input": st.text(max_size=3) | st.lists(TURNS | OBJECTS, max_size=3)},
    optional={**SHARED, "text": OBJECTS, "reasoning": OBJECTS, "include": LOOSE},
)
MESSAGES = st.fixed_dictionaries(
    {
        "model": st.just("fake"),
        "max_tokens": st.just(5),
        "messages": st.lists(TURNS, min_size=1, max_size=3),
    },
    optional={**SHARED, "system": LOOSE, "thinking": OBJECTS, "output_config": OBJECTS},
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    request=st.tuples(st.just("/v1/responses"), RESPONSES)
    | st.tuples(st.just("/v1/messages"), MESSAGES)
)
def test_any_conversation_is_answered_or_refused(request):
    """Every body gets an answer or an error below 500, and leaves no request behind."""
    path, body = request

    async def ask() -> None:
        engine = FakeEngine(reply=lambda ids, index: "ok")
        async with connected(engine) as client:
            response = await client.post(path, content=json.dumps(body))
        assert response.status_code in {200, 400}, (path, body, response.text)
        assert engine.num_unfinished == 0

    asyncio.run(ask())
