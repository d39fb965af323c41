"""`quire bench`: what it counts, and that its file says on what it was measured."""

from __future__ import annotations

import json

import pytest
from asking import served_in_thread
from fake_engine import FakeEngine
from typer.testing import CliRunner

from quire.core.engine.async_engine import AsyncEngine
from quire.core.serving.cli.application import application
from quire.core.serving.cli.bench.load import RequestRecord, summarize
from quire.core.serving.cli.bench.prompts import random_prompts, read_prompts
from quire.core.serving.cli.bench.report import distribution


@pytest.fixture
def report(tmp_path):
    """Runs `quire bench ...` and returns the record that it wrote."""

    def run(*arguments: str, status: int = 0) -> dict:
        path = tmp_path / "report.json"
        result = CliRunner().invoke(application, ["bench", *arguments, "--json", str(path)])
        assert result.exit_code == status, result.output
        return json.loads(path.read_text())

    return run


@pytest.fixture
def _fake_engines(monkeypatch):
    async def start(config):
        return FakeEngine()

    monkeypatch.setattr(AsyncEngine, "start", start)


@pytest.mark.usefixtures("_fake_engines")
def test_throughput_counts_every_token(report):
    """Prompts and outputs have the lengths that were asked, and the machine is named."""
    shape = ("--num-prompts", "5", "--input-len", "7", "--output-len", "3")
    record = report("throughput", "fake", *shape)
    results = record["results"]
    assert (results["requests"], results["prompt_tokens"], results["output_tokens"]) == (5, 35, 15)
    assert results["output_tokens_per_s"] == pytest.approx(15 / results["elapsed_s"])
    assert results["total_tokens_per_s"] == pytest.approx(50 / results["elapsed_s"])
    assert record["setup"]["device_name"] == "nothing"
    assert record["machine"]["packages"]["numpy"]
    assert record["command"]


@pytest.mark.usefixtures("_fake_engines")
def test_latency_is_of_whole_batches(report):
    """Mean and percentiles of the batch's time, and of each token's share."""
    shape = ("--batch-size", "2", "--output-len", "4", "--num-iterations", "3")
    results = report("latency", "fake", *shape)["results"]
    assert 0 < results["batch_p50_ms"] <= results["batch_p99_ms"]
    assert results["output_token_mean_ms"] == pytest.approx(results["batch_mean_ms"] / 4)


@pytest.mark.parametrize(
    "pace",
    [(), ("--max-concurrency", "2"), ("--request-rate", "500")],
    ids="".join,
)
def test_serve_measures_a_server(report, pace):
    """Load on a running server: every request is counted, and its times are ordered as they must be."""
    engine = FakeEngine()
    with served_in_thread(engine, api_keys=("k",)) as url:
        shape = ("--num-prompts", "6", "--input-len", "9", "--output-len", "5")
        record = report("serve", "--url", url, "--api-key", "k", *shape, *pace)
    results = record["results"]
    assert (results["requests"], results["failed_requests"]) == (6, 0)
    assert (results["prompt_tokens"], results["output_tokens"]) == (6 * 9, 6 * 5)
    assert 0 < results["time_to_first_token_p50_ms"] <= results["request_p50_ms"]
    assert results["inter_token_p50_ms"] <= results["request_p99_ms"]
    assert record["setup"]["model"] == "fake"
    assert all(len(submitted.prompt) == 9 for submitted in engine.submitted)


def test_serve_tells_failed_requests(report):
    """Requests that fail are counted apart, and the status says so."""
    with served_in_thread(FakeEngine(fail_at=2)) as url:
        record = report("serve", "--url", url, "--num-prompts", "2", status=1)
    assert record["results"]["failed_requests"] == 2


def test_record_shares_a_chunks_time_among_its_tokens():
    """Several tokens in a chunk: the gaps are those of tokens, not of chunks."""
    record = RequestRecord(sent_s=10.0, chunk_times_s=[11.0, 12.0, 14.0], end_s=15.0)
    record.num_output_tokens = 3
    assert record.times_s("inter_token") == [1.0, 2.0]
    record.num_output_tokens = 7
    assert record.times_s("inter_token") == [0.5] * 6
    assert record.times_s("time_to_first_token") == [1.0]
    assert record.times_s("request") == [5.0]


def test_summary_leaves_failed_requests_out_of_the_rates():
    """A failed request's tokens count nowhere."""
    good = RequestRecord(sent_s=0.0, num_prompt_tokens=4, num_output_tokens=6)
    bad = RequestRecord(sent_s=0.0, num_prompt_tokens=100, num_output_tokens=100, error="x")
    numbers = summarize([good, bad], 2.0)
    assert (numbers["failed_requests"], numbers["output_tokens_per_s"]) == (1, 3.0)
    assert numbers["total_tokens_per_s"] == 5.0


def test_distribution_is_in_milliseconds():
    """Times become mean and percentiles; of no times nothing is said."""
    numbers = distribution("x", [0.001, 0.003])
    assert numbers["x_mean_ms"] == pytest.approx(2.0)
    assert numbers["x_p50_ms"] == pytest.approx(2.0)
    assert distribution("x", []) == {}


def test_prompts_are_the_same_for_the_same_seed(tmp_path):
    """A measurement can be repeated on the same prompts."""
    assert random_prompts(2, 5, range(50), 1) == random_prompts(2, 5, range(50), 1)
    assert random_prompts(2, 5, range(50), 1) != random_prompts(2, 5, range(50), 2)
    path = tmp_path / "prompts"
    path.write_text("a\n\nb\n")
    assert read_prompts(path, 3) == ["a", "b", "a"]
