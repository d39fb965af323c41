"""`quire bench`: what it counts, and that its file says on what it was measured."""

from __future__ import annotations

import itertools
import json
import statistics

import pytest
from asking import served_in_thread
from fake_engine import FakeEngine
from typer.testing import CliRunner

from quire.core.engine.async_engine import AsyncEngine
from quire.core.errors import ConfigError
from quire.core.serving.cli.application import application
from quire.core.serving.cli.bench.arrivals import Arrivals
from quire.core.serving.cli.bench.datasets import DATASETS, make_questions, read_questions
from quire.core.serving.cli.bench.load import (
    Limits,
    Measurement,
    RequestRecord,
    goodput_of,
    summarize,
)
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
    [
        (),
        ("--max-concurrency", "2", "--arrivals", "closed"),
        ("--request-rate", "500"),
        ("--request-rate", "500", "--arrivals", "gamma", "--burstiness", "0.3"),
        ("--request-rate", "500", "--arrivals", "constant"),
    ],
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


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("api", [(), ("--chat",)])
def test_serve_asks_each_data_set_of_both_apis(report, dataset, api):
    """Any data set can be sent as completions and as chats; goodput is told where limits are."""
    engine = FakeEngine()
    with served_in_thread(engine) as url:
        shape = (
            "--num-prompts",
            "5",
            "--input-len",
            "20",
            "--output-len",
            "4",
            "--dataset",
            dataset,
        )
        limits = ("--ttft-limit-ms", "60000", "--itl-limit-ms", "60000")
        results = report("serve", "--url", url, *shape, *limits, *api)["results"]
    assert (results["requests"], results["failed_requests"]) == (5, 0)
    assert (results["output_tokens"], results["good_requests"], results["good_part"]) == (
        20,
        5,
        1.0,
    )
    assert len(engine.submitted) == 5


def test_serve_draws_what_it_saw(report, tmp_path):
    """Charts as a page of its own and as a picture."""
    page, picture = tmp_path / "plot.html", tmp_path / "plot.png"
    with served_in_thread(FakeEngine()) as url:
        shape = ("--num-prompts", "4", "--output-len", "5")
        report("serve", "--url", url, *shape, "--plot", str(page), "--plot", str(picture))
    text = page.read_text()
    assert text.count("<svg") == 4
    assert "http" not in text.split("</title>")[1].split("<h1>")[0]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("process", "burstiness", "variation"),
    [("constant", 1.0, 0.0), ("poisson", 1.0, 1.0), ("gamma", 0.25, 2.0), ("gamma", 4.0, 0.5)],
)
def test_arrivals_have_their_mean_and_their_spread(process, burstiness, variation):
    """The mean gap is 1 / rate, and its variation is what the process says: 1 / sqrt(shape)."""
    arrivals = Arrivals(process=process, rate=4.0, burstiness=burstiness, seed=1)
    gaps = list(itertools.islice(arrivals.gaps_s(), 20_000))
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.stdev(gaps) * 4.0 == pytest.approx(variation, rel=0.1, abs=1e-9)
    assert gaps == list(itertools.islice(arrivals.gaps_s(), 20_000))


@pytest.mark.parametrize("bad", [{"process": "x"}, {"process": "gamma"}, {"burstiness": 0.0}])
def test_arrivals_that_cannot_be_are_refused(bad):
    """A measurement is not begun with arrivals that mean nothing."""
    with pytest.raises(ConfigError):
        Arrivals(**bad)


def test_data_sets_have_what_their_names_say():
    """Shared prefixes are shared, and each turn of a conversation brings those before it."""
    shared = [q.prompt for q in make_questions("shared-prefix", 8, 40, 0)]
    assert len(set(shared)) == 8
    assert len({prompt.split()[:30].__str__() for prompt in shared}) == 4
    turns = make_questions("multi-turn", 4, 40, 0)
    assert [len(q.messages) for q in turns] == [1, 3, 5, 7]
    assert turns[3].messages[:5] == turns[2].messages


def test_questions_come_from_files_of_three_kinds(tmp_path):
    """ShareGPT's conversations, JSON a line, and plain lines."""
    files = {
        "a.json": json.dumps(
            [
                {
                    "conversations": [
                        {"from": "human", "value": "Hi"},
                        {"from": "gpt", "value": "a b c"},
                    ]
                },
                {"conversations": []},
            ]
        ),
        "b.jsonl": '{"prompt": "x", "output_len": 7}\n{"messages": [{"role": "user", "content": "y"}]}\n',
        "c.txt": "one\n\ntwo\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    [question] = read_questions(tmp_path / "a.json", 1)
    assert (question.prompt, question.output_len) == ("Hi", 3)
    first, second = read_questions(tmp_path / "b.jsonl", 2)
    assert (first.prompt, first.output_len, second.body(is_chat=False)) == ("x", 7, {"prompt": "y"})
    assert [q.prompt for q in read_questions(tmp_path / "c.txt", 3)] == ["one", "two", "one"]
    (tmp_path / "d.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match=r"d.json"):
        read_questions(tmp_path / "d.json", 1)


def test_goodput_counts_answers_within_both_limits():
    """An answer is good if its first token and the mean of the others came in time, and it did not fail."""
    quick = RequestRecord(sent_s=0.0, chunk_times_s=[0.1, 0.2, 0.3], num_output_tokens=3)
    late = RequestRecord(sent_s=0.0, chunk_times_s=[0.5, 0.6, 0.7], num_output_tokens=3)
    slow = RequestRecord(sent_s=0.0, chunk_times_s=[0.1, 0.6, 1.1], num_output_tokens=3)
    failed = RequestRecord(sent_s=0.0, chunk_times_s=[0.1], error="x")
    seen = Measurement(model="m", records=[quick, late, slow, failed], elapsed_s=2.0)
    limits = Limits(first_token_ms=200, inter_token_ms=200)
    assert goodput_of(seen, limits) == {
        "good_requests": 1,
        "good_part": 0.25,
        "goodput_requests_per_s": 0.5,
    }
    assert goodput_of(seen, Limits()) == {}
