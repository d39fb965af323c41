"""`/metrics`: names, and numbers that follow what happened."""

from __future__ import annotations

import asyncio

import prometheus_client
import pytest
from asking import LeavingClient, connected
from fake_engine import FakeEngine
from prometheus_client.parser import text_string_to_metric_families

BODY = {"prompt": "abc", "max_tokens": 5}


async def samples_of(client) -> dict[tuple, float]:
    text = (await client.get("/metrics")).text
    return {
        (sample.name, sample.labels.get("finished_reason") or sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_have_the_names_of_vllm(client):
    """Dashboards made for vLLM find everything under another prefix."""
    samples = await samples_of(client)
    names = {name for name, _ in samples}
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "num_preemptions_total",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "request_prompt_tokens_bucket",
        "request_generation_tokens_bucket",
    ):
        assert f"quire:{name}" in names, name
    assert samples["quire:num_requests_waiting", None] == 2
    assert samples["quire:kv_cache_usage_perc", None] == 0.25
    assert samples["quire:prefix_cache_hits_total", None] == 40


@pytest.mark.parametrize("stream", [False, True])
async def test_metrics_follow_requests(client, stream):
    """Each prompt has one first token, each output one end and one gap fewer than tokens."""
    await client.post("/v1/completions", json={**BODY, "n": 2, "stream": stream})
    await client.post("/v1/completions", json={**BODY, "max_tokens": 99, "stream": stream})
    samples = await samples_of(client)
    assert samples["quire:time_to_first_token_seconds_count", None] == 2
    assert samples["quire:e2e_request_latency_seconds_count", None] == 2
    assert samples["quire:inter_token_latency_seconds_count", None] == 4 + 4 + 12
    assert samples["quire:request_success_total", "length"] == 2
    assert samples["quire:request_success_total", "stop"] == 1
    assert samples["quire:request_prompt_tokens_sum", None] == 8
    assert samples["quire:request_generation_tokens_sum", None] == 5 + 5 + 13
    assert samples["quire:num_requests_running", None] == 0


async def test_metrics_count_aborted_outputs():
    """Outputs of a client that left are counted as aborted."""
    engine = FakeEngine(hold=asyncio.Event())
    async with connected(engine) as http:
        client = LeavingClient(http.app, "/v1/completions", {**BODY, "n": 3, "stream": True})
        running = asyncio.create_task(client.run())
        await client.has_events.wait()
        client.leaves.set()
        await asyncio.wait_for(running, 5)
        samples = await samples_of(http)
    assert samples["quire:request_success_total", "abort"] == 3


async def test_metrics_of_two_servers_are_apart():
    """Each server has its own registry; nothing goes into the global one."""
    async with connected(FakeEngine()) as one, connected(FakeEngine()) as other:
        await one.post("/v1/completions", json=BODY)
        first, second = await samples_of(one), await samples_of(other)
    assert first["quire:time_to_first_token_seconds_count", None] == 1
    assert second["quire:time_to_first_token_seconds_count", None] == 0
    names = {metric.name for metric in prometheus_client.REGISTRY.collect()}
    assert not any(name.startswith("quire") for name in names)
