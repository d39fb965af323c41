"""`quire batch`: every line answered once, whatever interrupts it."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from asking import connected, served_in_thread
from fake_engine import REPLY, FakeEngine, facts
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from quire.core.errors import ConfigError, EngineDeadError
from quire.core.serving.batch.lines import AnswerFile, BatchAnswer, check_lines, read_lines
from quire.core.serving.batch.run import BatchRunner, BatchStoppedError
from quire.core.serving.cli import engine_run
from quire.core.serving.cli.application import application


def line(number: int, url: str = "/v1/completions", **body) -> dict:
    body = {"prompt": f"prompt {number}", **body}
    return {"custom_id": f"id-{number}", "method": "POST", "url": url, "body": body}


def write(path: Path, lines: list) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    return write(tmp_path / "in.jsonl", [line(n) for n in range(10)]), tmp_path / "out.jsonl"


async def answer_all(client, source: Path, output: Path, **settings) -> None:
    """What the command does, without the command."""
    fields = {"concurrency": 3, "max_retries": 0, "first_wait_s": 0.0, **settings}
    with AnswerFile(output) as answers:
        answers.resume(check_lines(source), drops_failed=False)
        done = frozenset(answers.done)
        left = (one for one in read_lines(source) if one.custom_id not in done)
        await BatchRunner(client=client, **fields).run(left, answers.add)


def run_command(*arguments: object):
    return CliRunner().invoke(application, ["batch", *map(str, arguments)])


async def test_batch_answers_every_line_once(client, files):
    """Each line has its own answer, in the form of the OpenAI batch API."""
    await answer_all(client, *files)
    records = read(files[1])
    assert sorted(record["custom_id"] for record in records) == sorted(f"id-{n}" for n in range(10))
    for record in records:
        assert set(record) == {"id", "custom_id", "response", "error"}
        assert record["response"]["status_code"] == 200
        assert record["response"]["body"]["choices"][0]["text"] == REPLY
    assert len({record["id"] for record in records}) == 10


async def test_batch_keeps_its_concurrency(files):
    """No more lines than asked are in the engine at once, and as many as asked."""
    engine, most = FakeEngine(), 0
    submit = engine.submit

    async def counted(*args, **options):
        nonlocal most
        stream = await submit(*args, **options)
        most = max(most, engine.num_unfinished)
        return stream

    engine.submit = counted
    async with connected(engine) as client:
        await answer_all(client, *files, concurrency=4)
    assert most == 4


async def test_batch_that_is_interrupted_goes_on(files):
    """A run that dies leaves whole lines; the next one answers what is left and nothing twice."""
    engine = FakeEngine()
    async with connected(engine) as client:
        submit, num_asked = engine.submit, 0

        async def dying(*args, **options):
            nonlocal num_asked
            num_asked += 1
            if num_asked == 6:
                engine.dead_error = EngineDeadError("gone")
            return await submit(*args, **options)

        engine.submit = dying
        with pytest.raises(BatchStoppedError, match="run the same command again"):
            await answer_all(client, *files)
    first = read(files[1])
    assert 0 < len(first) < 10
    healthy = FakeEngine()
    async with connected(healthy) as client:
        await answer_all(client, *files)
    assert read(files[1])[: len(first)] == first
    assert len({record["custom_id"] for record in read(files[1])}) == 10 == len(read(files[1]))
    assert len(healthy.submitted) == 10 - len(first)


@given(cut=st.integers(0, 2000))
def test_batch_output_that_was_cut_anywhere_is_resumed(tmp_path_factory, cut):
    """Wherever a crash cut the file, what is whole is kept, and the rest is asked again."""
    output = tmp_path_factory.mktemp("batch") / "out.jsonl"
    whole = [BatchAnswer(f"id-{n}", 200, "r", {"text": "é" * n}).to_line() for n in range(5)]
    output.write_bytes(b"".join(whole)[:cut])
    with AnswerFile(output) as answers:
        answers.resume(frozenset(f"id-{n}" for n in range(5)), drops_failed=False)
        kept = len(answers.done)
        answers.add(BatchAnswer("new", 200, "r", {}))
    assert kept == sum(len(b"".join(whole[: n + 1])) <= cut for n in range(5))
    assert [record["custom_id"] for record in read(output)] == [
        *(f"id-{n}" for n in range(kept)),
        "new",
    ]


async def test_batch_waits_for_a_server_without_room(files):
    """A full queue is waited for; with no retries left the run stops and keeps what it has."""
    num_refused = 0

    def handle(request: httpx.Request) -> httpx.Response:
        nonlocal num_refused
        num_refused += 1
        return httpx.Response(200 if num_refused % 3 == 0 else 429, json={"n": num_refused})

    transport = httpx.MockTransport(handle)
    async with httpx.AsyncClient(transport=transport, base_url="http://s") as client:
        await answer_all(client, *files, max_retries=30)
        assert len(read(files[1])) == 10
        num_refused = -1000
        files[1].unlink()
        with pytest.raises(BatchStoppedError, match="429"):
            await answer_all(client, *files, max_retries=1)


def test_batch_at_a_server_with_errors_ends_with_1(files):
    """Lines fail alone, the status says so, and --retry-failed asks those again."""
    source, output = files
    write(source, [line(0), line(1, temperature=-1), line(2, "/v1/embeddings"), line(3)])
    with served_in_thread(FakeEngine(), api_keys=("key",)) as url:
        asked = (source, "-o", output, "--url", f"{url}/v1", "--api-key", "key")
        result = run_command(*asked)
        assert result.exit_code == 1, result.output
        statuses = {r["custom_id"]: r["response"]["status_code"] for r in read(output)}
        assert statuses == {"id-0": 200, "id-1": 400, "id-2": 400, "id-3": 200}
        # What failed is kept unless it is asked for.
        assert run_command(*asked).exit_code == 1
        assert len(read(output)) == 4
        write(source, [line(n) for n in range(4)])
        assert run_command(*asked, "--retry-failed").exit_code == 0
        assert len(read(output)) == 4


def test_batch_all_kinds_of_lines(tmp_path):
    """Every url that a line may name is served."""
    chat = [{"role": "user", "content": "a"}]
    bodies = {
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": chat},
        "/v1/responses": {"input": "a"},
        "/v1/messages": {"model": "fake", "max_tokens": 5, "messages": chat},
        "/generate": {"inputs": "a"},
        "/v1/embeddings": {"input": "a"},
        "/pooling": {"input": "a"},
        "/score": {"text_1": "a", "text_2": "b"},
        "/v1/score": {"text_1": "a", "text_2": "b"},
        "/rerank": {"query": "a", "documents": ["b"]},
        "/v1/rerank": {"query": "a", "documents": ["b"]},
        "/v2/rerank": {"query": "a", "documents": ["b"]},
        "/classify": {"input": "a"},
    }
    lines = [{"custom_id": u, "method": "POST", "url": u, "body": b} for u, b in bodies.items()]
    source, output = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    engine = FakeEngine(facts=facts(tasks=["generate", "embed", "classify"]))
    with served_in_thread(engine) as url:
        result = run_command(source, "-o", output, "--url", url)
    failed = [r for r in read(output) if r["response"]["status_code"] != 200]
    assert (result.exit_code, failed) == (0, []), result.output


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["{"], "line 1: no JSON"),
        ([json.dumps([])], "no JSON object"),
        ([json.dumps(line(0)), json.dumps(line(0))], "is line 1's"),
        ([json.dumps(line(0, url="/v1/nothing"))], "is none of"),
        ([json.dumps(line(0, stream=True))], "whole answers"),
        ([json.dumps({**line(0), "method": "GET"})], "it is POST"),
        ([json.dumps({**line(0), "priority": 1})], "'priority' is missing or unknown"),
        ([json.dumps({"custom_id": "a", "body": {}})], "'url' is missing or unknown"),
        ([json.dumps({**line(0), "custom_id": 1})], "custom_id is no text"),
        ([], "holds no lines"),
    ],
)
def test_batch_input_is_checked_before_anything_runs(tmp_path, lines, problem):
    """A file that is wrong anywhere is refused with the line, and nothing is written for it."""
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError) as refused:
        check_lines(source)
    assert problem in str(refused.value)
    result = run_command(source, "-o", tmp_path / "out.jsonl", "--url", "http://127.0.0.1:1")
    assert result.exit_code == 2


def test_batch_refuses_an_output_that_is_not_its_own(files):
    """Neither another batch's answers nor another run's are written over."""
    source, output = files
    ids = check_lines(source)
    for text in ('{"custom_id": "x", "response": {"status_code": 200}}\n', "notes\nof mine\n"):
        output.write_text(text)
        with AnswerFile(output) as answers, pytest.raises(ConfigError, match="another output"):
            answers.resume(ids, drops_failed=False)
        assert output.read_text() == text
    with AnswerFile(output), pytest.raises(ConfigError, match="another run"), AnswerFile(output):
        pass


def test_batch_needs_a_model_or_a_server(files):
    """One of them, not both, and no engine settings for a server."""
    source, output = files
    for options in ((), ("--url", "http://a", "--model", "demo"), ("--max-num-seqs", "4")):
        assert run_command(source, "-o", output, *options).exit_code == 2


def test_batch_with_a_model_starts_an_engine(files, monkeypatch):
    """With --model the lines go through the server's code to an engine of the command's own."""
    engine = FakeEngine()

    @asynccontextmanager
    async def started(config):
        assert (config.model, config.max_num_seqs) == ("fake", 4)
        yield engine

    monkeypatch.setattr(engine_run, "started", started)
    options = ("--model", "fake", "--max-num-seqs", 4)
    assert run_command(files[0], "-o", files[1], *options).exit_code == 0
    assert len(read(files[1])) == 10 == len(engine.submitted)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_batch_with_an_engine_of_its_own(tmp_path):
    """The command alone answers a file, in a process like a user's."""
    from tiny_models import make_tiny_model

    model = make_tiny_model("llama", tmp_path / "llama")
    lines = [line(n, max_tokens=4, temperature=0, ignore_eos=True) for n in range(6)]
    source, output = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "quire", "batch", str(source), "-o", str(output)]
    options = ["--model", str(model), "--cache-memory-bytes", "8M"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "6 lines, 0 failed" in done.stderr
    assert {r["response"]["body"]["usage"]["completion_tokens"] for r in read(output)} == {4}
    assert len(read(output)) == 6
