"""SIGTERM under load, with the real engine in its own process."""

from __future__ import annotations

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from test_end_to_end import quire_serve
from tiny_models import make_tiny_model

CLIENTS, RUNNING, TOKENS = 12, 4, 100


def stream_whole(address: str, begun: threading.Semaphore) -> tuple[int, list[dict]]:
    """The status of one long stream and its events; `begun` is released when the head came."""
    body = {
        "prompt": "a",
        "max_tokens": TOKENS,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    with httpx.stream("POST", f"{address}/completions", json=body, timeout=120) as response:
        begun.release()
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return response.status_code, [json.loads(line[6:]) for line in lines[:-1]]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sigterm_under_load_loses_no_accepted_request(tmp_path):
    """What was let in, running or queued, is answered whole after SIGTERM; then the status is 0."""
    model = make_tiny_model("llama", tmp_path / "llama")
    options = ("--max-num-seqs", str(RUNNING), "--shutdown-timeout-s", "120")
    begun = threading.Semaphore(0)
    with quire_serve(model, *options) as (process, address), ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pool.submit(stream_whole, address, begun) for _ in range(CLIENTS)]
        for _ in range(CLIENTS):
            assert begun.acquire(timeout=60)
        process.send_signal(signal.SIGTERM)
        for answer in answers:
            status, events = answer.result(120)
            assert status == 200
            assert not any("error" in event for event in events)
            assert events[-1]["usage"]["completion_tokens"] == TOKENS
        assert process.wait(60) == 0
