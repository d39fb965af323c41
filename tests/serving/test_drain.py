"""SIGTERM under load, with the real engine in its own process."""

from __future__ import annotations

import json
import os
import queue
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from test_end_to_end import quire_serve
from test_supervision import core_pid, wait_status
from tiny_models import make_tiny_model

RUNNING, HELD, TOKENS = 4, 8, 100


def stream_whole(address: str, heads: queue.Queue[int]) -> tuple[int, list[dict]]:
    """The status of one long stream and its events; `heads` gets the status when the head came."""
    body = {
        "prompt": "a",
        "max_tokens": TOKENS,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    with httpx.stream("POST", f"{address}/completions", json=body, timeout=120) as response:
        heads.put(response.status_code)
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return response.status_code, [json.loads(line[6:]) for line in lines[:-1]]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("has_worker_process", [False, True], ids=["in_core", "worker_process"])
def test_sigterm_under_load_loses_no_accepted_request(tmp_path, has_worker_process):
    """What was let in, running or queued, is answered whole after SIGTERM; then the status is 0."""
    model = make_tiny_model("llama", tmp_path / "llama")
    options = ["--max-num-seqs", str(RUNNING), "--shutdown-timeout-s", "120"]
    if has_worker_process:
        options.append("--worker-process")
    heads: queue.Queue[int] = queue.Queue()
    with (
        quire_serve(model, *options) as (process, address),
        ThreadPoolExecutor(RUNNING + HELD) as pool,
        httpx.Client(base_url=address.removesuffix("/v1"), timeout=60) as client,
    ):
        core = core_pid(process.pid)
        answers = [pool.submit(stream_whole, address, heads) for _ in range(RUNNING)]
        assert [heads.get(timeout=60) for _ in range(RUNNING)] == [200] * RUNNING
        # While the core stands still nothing ends: what is accepted now is in flight at SIGTERM.
        os.kill(core, signal.SIGSTOP)
        held = [pool.submit(stream_whole, address, heads) for _ in range(HELD)]
        assert [heads.get(timeout=60) for _ in range(HELD)] == [200] * HELD
        process.send_signal(signal.SIGTERM)
        wait_status(client, "/ready", 503)
        assert psutil.Process(core).status() == psutil.STATUS_STOPPED
        assert not any(answer.done() for answer in held)
        os.kill(core, signal.SIGCONT)
        for answer in answers + held:
            status, events = answer.result(120)
            assert status == 200
            assert not any("error" in event for event in events)
            assert events[-1]["usage"]["completion_tokens"] == TOKENS
        assert process.wait(60) == 0
        assert not psutil.pid_exists(core)
