"""docs/serving.md says what the server does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from asking import connected
from fake_engine import FakeEngine

from quire.core.serving.protocol.chat import ChatRequest
from quire.core.serving.protocol.completions import CompletionRequest

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
ENDPOINTS = (Path(__file__).parents[2] / "docs" / "endpoints.md").read_text()
NAMES = set(re.findall(r"[A-Za-z_0-9:/{}.-]+", PAGE + ENDPOINTS))


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_every_field_is_documented(model):
    """A field that is honoured is named on the page."""
    assert set(model.model_fields) <= NAMES


async def test_every_metric_that_is_documented_exists():
    """The page promises no number that /metrics does not have."""
    section = PAGE.split("## Metrics")[1]
    promised = set(re.findall(r"`([a-z0-9_]+)`", section)) - {"finished_reason"}
    assert len(promised) >= 15
    async with connected(FakeEngine()) as client:
        text = (await client.get("/metrics")).text
    kept = {re.sub(r"_total$", "", name) for name in re.findall(r"# TYPE quire:(\w+)", text)}
    assert {re.sub(r"_total$", "", name) for name in promised} <= kept


async def test_every_endpoint_is_documented():
    """The page and the API's own schema name the same paths."""
    async with connected(FakeEngine()) as client:
        schema = (await client.get("/openapi.json")).json()
    assert set(schema["paths"]) <= NAMES
