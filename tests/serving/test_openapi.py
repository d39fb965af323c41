"""The OpenAPI document against the server: schemathesis sends what the document allows and more."""

from __future__ import annotations

import pytest
import schemathesis
from asking import connected
from fake_engine import FakeEngine, facts
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from quire.core.serving.http.app import make_app
from quire.core.serving.http.openapi import make_document
from quire.core.serving.settings import ServerSettings

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
TASKS = ["generate", "embed", "classify", "transcribe"]


def make_application():
    engine = FakeEngine(reply=lambda ids, index: "ok", facts=facts(tasks=TASKS))
    return make_app(engine, ServerSettings())


DOCUMENT = make_document(make_application())
OPERATIONS = [
    (method, path) for path, methods in DOCUMENT["paths"].items() for method in sorted(methods)
]


def check_operation(method: str, path: str, num_examples: int) -> None:
    app = make_application()
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operation = schema[path][method.upper()]
    cases = st.one_of(
        operation.as_strategy(),
        operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE),
    )

    @seed(1)
    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def ask(case) -> None:
        case.call_and_validate(checks=CHECKS, timeout=20)

    ask()
    assert app.state.server.engine.num_unfinished == 0
    assert app.state.server.gate.num_inside == 0


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_operation_keeps_to_the_document(method, path):
    """No answer is the server's fault, or of a form that the document does not know."""
    check_operation(method, path, 4)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_operation_keeps_to_the_document_at_length(method, path):
    """The same with more bodies."""
    check_operation(method, path, 300)


def test_document_describes_every_operation():
    """Each has a sentence, what it gives, and errors; each POST says what it takes."""
    for method, path in OPERATIONS:
        operation = DOCUMENT["paths"][path][method]
        assert operation["description"], path
        assert "default" in operation["responses"], path
        takes_none = path.endswith("/cancel")
        assert ("requestBody" in operation) == (method == "post" and not takes_none), path
        told = operation["responses"]["200"].get("content")
        assert told != {"application/json": {"schema": {}}}, path


async def test_document_is_the_one_that_is_served():
    """Clients get the same document, without a key of their own on a server without keys."""
    async with connected(FakeEngine()) as client:
        served = (await client.get("/openapi.json")).json()
    assert set(served["paths"]) >= set(DOCUMENT["paths"])
