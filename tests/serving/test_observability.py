"""Metrics, traces, the dashboard and `quire top`: what people see of a server."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
from asking import connected, served_in_thread
from fake_engine import FakeEngine, facts
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from quire.core.errors import EngineDeadError
from quire.core.serving.cli.application import application
from quire.core.serving.cli.top import TopView, gauge, sparkline
from quire.core.serving.http.middleware import RequestIdMiddleware
from quire.core.serving.operations import tracing
from quire.core.serving.operations.engine_metrics import core_use

BODY = {"prompt": "abc", "max_tokens": 5}
DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "quire.json"


async def samples_of(client) -> dict[tuple, float]:
    text = (await client.get("/metrics")).text
    return {
        (
            sample.name,
            *(
                v
                for k, v in sorted(sample.labels.items())
                if k not in ("model_name", "device", "le")
            ),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_every_metric_of_the_dashboard_exists():
    """A panel without numbers would be a lie: each name that a query uses is one that /metrics tells."""
    queries = [
        target["expr"]
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel["targets"]
    ]
    named = {name for query in queries for name in re.findall(r"\b(?:quire:|process_)\w+", query)}
    assert len(named) > 20
    async with connected(
        FakeEngine(facts=facts(startup_s={"load": 1.0}, tasks=["generate", "embed"]))
    ) as client:
        await client.post("/v1/completions", json=BODY)
        told = {name for name, *_ in await samples_of(client)}
    assert named <= told


def test_dashboard_panels_do_not_overlap():
    """Each panel has its place on the page."""
    cells = [
        (x, y)
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


async def test_metrics_tell_stages_memory_and_the_core():
    """Where the start went, and what the engine's own process takes, also while it idles."""
    engine = FakeEngine(facts=facts(startup_s={"load": 1.5, "warm_up": 0.5}))
    async with connected(engine) as client:
        samples = await samples_of(client)
    assert samples["quire:startup_seconds", "load"] == 1.5
    assert samples["quire:core_cpu_seconds_total",] > 0
    assert samples["quire:core_resident_memory_bytes",] > 2**20


@pytest.mark.parametrize("stream", [False, True])
async def test_metrics_tell_each_stage_of_a_request(stream):
    """Prefill, decode and inference are observed once a prompt, whole or streamed."""
    async with connected(FakeEngine()) as client:
        await client.post("/v1/completions", json={**BODY, "stream": stream})
        samples = await samples_of(client)
    for name in ("prefill_time", "decode_time", "inference_time", "time_per_output_token"):
        assert samples.get((f"quire:request_{name}_seconds_count",)) == 1, name


async def test_counters_do_not_fall_when_the_engine_is_replaced():
    """A restart begins a new engine at nothing; what clients see only grows."""
    async with connected(FakeEngine(num_output_tokens=70)) as client:
        assert (await samples_of(client))["quire:generation_tokens_total",] == 70
        client.app.state.server.replace_engine(FakeEngine(num_output_tokens=5))
        after = await samples_of(client)
    assert after["quire:generation_tokens_total",] == 75
    assert after["quire:engine_restarts_total",] == 1


def test_core_use_of_a_process_that_is_gone_is_unknown():
    """Metrics go on when the engine's process has died."""
    assert core_use(2**22 + 1) is None


# ----------------------------------------------------------------------------------------- traces


@pytest.fixture
def spans(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "make_provider", lambda endpoint: provider)
    return exporter.get_finished_spans


@pytest.mark.parametrize("stream", [False, True])
async def test_trace_goes_on_from_the_clients(spans, stream):
    """The span of a request stands in the client's trace, with tokens and its stages as children."""
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with connected(FakeEngine(), otlp_traces_endpoint="http://collector") as client:
        await client.post(
            "/v1/completions", json={**BODY, "stream": stream}, headers={"traceparent": parent}
        )
        await client.get("/health")
    found = {span.name: span for span in spans()}
    root = found.pop("POST /v1/completions")
    assert f"{root.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{root.parent.span_id:016x}" == "b7ad6b7169203331"
    assert root.attributes["gen_ai.usage.output_tokens"] == 5
    assert root.attributes["gen_ai.usage.input_tokens"] > 0
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["gen_ai.latency.time_to_first_token"] >= 0
    assert "abc" not in json.dumps(dict(root.attributes))
    assert set(found) == {"queue", "prefill", "decode"}
    for child in found.values():
        assert child.parent.span_id == root.context.span_id
        assert child.start_time <= child.end_time


async def test_trace_without_a_parent_begins_one(spans):
    """A client without a trace, or with a broken one, gets a span of its own."""
    async with connected(FakeEngine(), otlp_traces_endpoint="http://collector") as client:
        await client.post("/v1/completions", json={"prompt": []}, headers={"traceparent": "broken"})
    [span] = spans()
    assert span.parent is None
    assert span.attributes["http.response.status_code"] == 400


async def test_no_endpoint_makes_no_spans(spans):
    """Tracing costs nothing where nobody asked for it."""
    async with connected(FakeEngine()) as client:
        await client.post("/v1/completions", json=BODY)
        kinds = [middleware.cls for middleware in client.app.user_middleware]
    assert spans() == ()
    assert kinds[0] is RequestIdMiddleware
    assert tracing.TracingMiddleware not in kinds


# -------------------------------------------------------------------------------------------- top


def test_top_once_shows_a_server():
    """One look, one frame, status 0."""
    with served_in_thread(FakeEngine(), api_keys=("k",)) as url:
        result = CliRunner().invoke(application, ["top", "--url", url, "--api-key", "k", "--once"])
        refused = CliRunner().invoke(application, ["top", "--url", url, "--once"])
    assert result.exit_code == 0, result.output
    for words in ("fake", "ready", "null (nothing)", "2 waiting", "25.0%"):
        assert words in result.stdout
    assert refused.exit_code == 2
    assert "--api-key" in refused.stderr


def test_top_of_nothing_is_one_message():
    """Where no server answers, the message says where it looked."""
    result = CliRunner().invoke(application, ["top", "--url", "http://127.0.0.1:9", "--once"])
    assert result.exit_code == 2
    assert "http://127.0.0.1:9" in result.stderr


def test_top_counts_speed_between_looks():
    """Tokens a second are those between two looks; a restarted engine is no negative speed."""
    view = TopView("u")
    for at_s, number in ((0.0, 10), (2.0, 30), (3.0, 5)):
        view.add({"statistics": {"num_output_tokens": number}}, at_s)
    assert view.speeds == [10.0, 0.0]
    assert sparkline([0.0, 5.0, 10.0]) == " ▄█"
    assert gauge(0.5, 4) == "██░░ 50.0%"


async def test_load_tells_what_is_inside_runs_and_waits():
    """A balancer sees what a server has to do, without reading all metrics, and after a death too."""
    engine = FakeEngine(hold=asyncio.Event())
    async with connected(engine) as client:
        asked = asyncio.ensure_future(client.post("/v1/completions", json=BODY))
        while not engine.streams:  # noqa: ASYNC110
            await asyncio.sleep(0)
        busy = (await client.get("/load")).json()
        engine.hold.set()
        assert (await asked).status_code == 200
        idle = (await client.get("/load")).json()
        engine.dead_error = EngineDeadError("gone")
        gone = (await client.get("/load")).json()
    assert busy == {"server_load": 1, "running": 1, "waiting": 2, "cache_usage": 0.25}
    assert idle == {**busy, "server_load": 0, "running": 0}
    assert gone == {"server_load": 0, "running": 0, "waiting": 0, "cache_usage": 0.0}
