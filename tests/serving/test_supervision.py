"""An engine that dies: who hears of it, how soon, and what comes after."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from asking import error_of
from test_end_to_end import quire_serve
from test_lifecycle import held_stream, served
from tiny_models import make_tiny_model

TOLD_WITHIN_S = 5.0
PATIENCE_S = 90.0


def wait_status(client: httpx.Client, path: str, status: int) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while client.get(path).status_code != status:
        assert time.monotonic() < give_up, f"{path} never answered {status}"


def test_dead_engine_is_restarted_and_answers_again():
    """With restart the server stays, tells that it is not ready, and is ready again with a new engine."""
    with served(on_engine_death="restart") as one:
        assert one.client.post("/v1/completions", json={"prompt": "die"}).status_code == 503
        refused = one.client.get("/ready")
        if refused.status_code != 200:  # a quick restart may be over already
            error_of(refused, 503)
        wait_status(one.client, "/ready", 200)
        give_up = time.monotonic() + PATIENCE_S
        while (
            'quire:engine_restarts_total{model_name="fake"} 1.0'
            not in one.client.get("/metrics").text
        ):
            assert time.monotonic() < give_up
        wait_status(one.client, "/ready", 200)
        assert one.client.post("/v1/completions", json={"prompt": "release"}).status_code == 200
        one.process.send_signal(signal.SIGTERM)
        assert one.ends() == 0


def test_engine_that_dies_too_often_ends_the_server():
    """Restarts are counted: one death more than allowed ends the process with 1."""
    with served(on_engine_death="restart", max_engine_restarts=0) as one:
        assert one.client.post("/v1/completions", json={"prompt": "die"}).status_code == 503
        assert one.ends() == 1


def test_death_ends_streams_that_are_held_by_it():
    """With exit too, whoever waits for the engine is answered before the process ends."""
    with served(on_engine_death="exit") as one, held_stream(one) as lines:
        with httpx.Client(base_url=one.url) as other:
            assert other.post("/v1/completions", json={"prompt": "die"}).status_code == 503
        assert "".join(lines).endswith("data: [DONE]")
        assert one.ends() == 1


def stream_until_error(address: str, has_begun) -> tuple[float, str]:
    """When the last byte of a long stream came, and what it said."""
    body = {"prompt": "a", "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{address}/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        first = next(lines)
        has_begun.append(first)
        # One that comes when the core is dead is refused, in a single line.
        said = "".join([first, *lines])
    return time.monotonic(), said


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", ["core", "worker"])
def test_killed_process_is_told_within_seconds_and_replaced(tmp_path, victim):
    """kill -9 in mid-stream: all clients hear it in 5 s, a new engine comes, a second death ends all."""
    model = make_tiny_model("llama", tmp_path / "llama")
    options = ["--max-engine-restarts", "1", "--on-engine-death", "restart", "--max-num-seqs", "8"]
    if victim == "worker":
        options.append("--worker-process")
    with quire_serve(model, *options) as (process, address):
        base = address.removesuffix("/v1")
        with httpx.Client(base_url=base, timeout=60) as client, ThreadPoolExecutor(8) as pool:
            killed = victim_pid(process.pid, victim)
            _kill_in_mid_stream(client, pool, address, killed)
            wait_status(client, "/ready", 200)
            assert not psutil.pid_exists(killed)
            again = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 4})
            assert again.status_code == 200
            os.kill(victim_pid(process.pid, victim), signal.SIGKILL)
        assert process.wait(60) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_worker_killed_while_idle_ends_the_server_where_exit_is_asked_for(tmp_path):
    """Nobody need ask: the engine notices by itself, and the process ends with 1, its core with it."""
    model = make_tiny_model("llama", tmp_path / "llama")
    with quire_serve(model, "--worker-process", "--on-engine-death", "exit") as (process, _):
        core = core_pid(process.pid)
        os.kill(core_pid(core), signal.SIGKILL)
        assert process.wait(60) == 1
        assert not psutil.pid_exists(core)


def victim_pid(server_pid: int, victim: str) -> int:
    """The engine core of a server, or the worker in a process of its own under that."""
    core = core_pid(server_pid)
    return core if victim == "core" else core_pid(core)


def core_pid(parent_pid: int) -> int:
    """The child that computes: the one that multiprocessing spawned, not its resource tracker."""
    for child in psutil.Process(parent_pid).children():
        if "spawn_main" in " ".join(child.cmdline()):
            return child.pid
    raise AssertionError("the process has no child that computes")


def _kill_in_mid_stream(
    client: httpx.Client, pool: ThreadPoolExecutor, address: str, victim: int
) -> None:
    begun: list[str] = []
    # More than the core runs at once, so that some still wait in its queue.
    waiting = [pool.submit(stream_until_error, address, begun) for _ in range(8)]
    while not begun and not any(future.done() for future in waiting):
        pass
    killed_s = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    ends = [future.result() for future in waiting]
    assert max(end_s for end_s, _ in ends) - killed_s < TOLD_WITHIN_S
    assert all('"error"' in text or "length" in text for _, text in ends)
    assert any("SIGKILL" in text for _, text in ends)
    assert client.get("/ready").status_code == 503
