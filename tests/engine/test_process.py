"""The engine core in its own process: the same answers, and one clear error when it is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from engine_fakes import build_fake_core, expected_tokens, spec

from quire.core.config import EngineConfig
from quire.core.engine import core_process
from quire.core.engine.client import CoreClient, ProcessClient
from quire.core.errors import ConfigError, EngineDeadError, RequestError, UnsupportedError
from quire.core.executor.child_process import shorten_crash

DEADLINE_S = 30.0


def start(*, transport: str | None = None, **options: str) -> ProcessClient:
    config = EngineConfig(
        model="fake-model", options={f"fake.{name}": value for name, value in options.items()}
    )
    return ProcessClient(config, build_core=build_fake_core, transport=transport)


@pytest.fixture(scope="module")
def client() -> Iterator[ProcessClient]:
    """One process for the tests that do it no harm."""
    client = start()
    yield client
    client.close()


def receive_tokens(client: CoreClient, request_id: str) -> list[int]:
    tokens: list[int] = []
    while True:
        for update in client.receive():
            if update.request_id == request_id:
                tokens += update.new_token_ids
                if update.finish_reason is not None:
                    return tokens


def wait_until(is_so: Callable[[], bool]) -> None:
    """Asks again until it is so; a machine under load takes its time."""
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen"
        os.sched_yield()


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_receive_gives_the_tokens_of_the_core(client):
    """Requests and updates cross the processes whole."""
    client.add([spec("a", [5, 6, 7], max_tokens=6), spec("b", [8], max_tokens=2)])
    assert receive_tokens(client, "a") == expected_tokens([5, 6, 7], 6)


def test_statistics_between_steps_loses_no_update(client):
    """A call that is answered in the middle of a stream leaves the updates in order."""
    client.add([spec("c", [9, 9], max_tokens=100)])
    for _ in range(5):
        assert client.statistics().num_steps >= 0
    assert receive_tokens(client, "c") == expected_tokens([9, 9], 100)
    assert client.reset_prefix_cache() is True
    assert client.facts.architecture == "Fake"


def test_register_logits_processor_across_processes_is_refused(client):
    """A function cannot be sent to another process; the message says what to do."""
    with pytest.raises(RequestError, match="module:function"):
        client.register_logits_processor("f", print)


def test_idle_process_uses_no_cpu(client):
    """An engine without requests costs nothing: it sleeps in its socket."""
    client.add([spec("d", [5], max_tokens=2)])
    receive_tokens(client, "d")
    child = psutil.Process(client.pid)
    wait_until(lambda: child.status() in (psutil.STATUS_SLEEPING, psutil.STATUS_IDLE))
    before, began = sum(child.cpu_times()[:2]), time.monotonic()
    wait_until(lambda: time.monotonic() - began > 0.5)
    used = sum(child.cpu_times()[:2]) - before
    assert used < 0.1, f"{used} s of CPU in half a second"


def test_wait_for_ears_before_the_child_listens_refuses(monkeypatch):
    """A request that is sent before the core's socket is there would be lost, and waited for for ever."""
    monkeypatch.setattr(core_process, "_CONNECT_LIMIT_MS", 0)
    process = core_process.CoreProcess(EngineConfig(model="fake-model"), build_fake_core)
    try:
        with pytest.raises(EngineDeadError, match="does not listen"):
            process.wait_for_ears()
    finally:
        process.kill()
    assert is_gone(process.pid)


def test_start_over_loopback_serves_too():
    """Where Unix sockets do not exist the engine still works."""
    client = start(transport="tcp")
    try:
        client.add([spec("a", [5, 6], max_tokens=3)])
        assert receive_tokens(client, "a") == expected_tokens([5, 6], 3)
    finally:
        client.close()


def test_start_that_fails_raises_what_the_core_met():
    """A refusal at the start is the user's own error, not a dead engine."""
    with pytest.raises(ConfigError, match="nothing fits"):
        start(start="config")
    with pytest.raises(UnsupportedError) as refused:
        start(start="unsupported")
    assert [reason.code for reason in refused.value.reasons] == ["a.b", "c.d"]
    assert str(refused.value).startswith("this model is not supported")
    with pytest.raises(EngineDeadError) as dead:
        start(start="bug")
    assert dead.value.root_cause == "ZeroDivisionError: a bug of ours"
    assert any("Traceback" in note for note in dead.value.__notes__)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("bug", "ZeroDivisionError: a bug of the worker"),
        ("lost", "DeviceLost: the device fell off the bus"),
        ("exit", "exited with code 7"),
    ],
)
def test_receive_after_death_tells_the_cause_every_time(fault, cause):
    """However the core dies, whoever asks gets EngineDeadError with the root cause, and nothing is left behind."""
    client = start(step=fault)
    directory = Path(client._process.endpoints.directory)
    try:
        client.add([spec("a", [5], max_tokens=50)])
        for _ in range(2):
            with pytest.raises(EngineDeadError) as dead:
                receive_tokens(client, "a")
            assert cause in dead.value.root_cause
        with pytest.raises(EngineDeadError):
            client.add([spec("b", [5])])
        with pytest.raises(EngineDeadError):
            client.statistics()
    finally:
        client.close()
    assert is_gone(client.pid)
    assert not directory.exists()


def test_receive_after_kill_tells_the_signal():
    """A core that the kernel kills leaves no words; how it ended is the cause."""
    client = start(step="hang", at="2")
    try:
        client.add([spec("a", [5], max_tokens=200)])
        client.receive()
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            receive_tokens(client, "a")
    finally:
        client.close()


def test_receive_after_crash_in_native_code_shows_where():
    """A segmentation fault leaves the stack of every thread."""
    client = start(step="hang", at="2")
    try:
        client.add([spec("a", [5], max_tokens=200)])
        client.receive()
        os.kill(client.pid, signal.SIGSEGV)
        with pytest.raises(EngineDeadError, match="SIGSEGV") as dead:
            receive_tokens(client, "a")
        assert any("Current thread" in note for note in dead.value.__notes__)
    finally:
        client.close()


def test_shorten_crash_keeps_the_thread_that_crashed():
    """A background thread deep in an import leaves a long stack, and faulthandler writes it first."""
    deep = "Thread 0x01 (most recent call first):" + '\n  File "deep.py", line 1 in f' * 99
    crashed = 'Current thread 0x02 (most recent call first):\n  File "here.py", line 2 in g'
    headline = "Fatal Python error: Segmentation fault"
    text = f"{headline}\n\n{deep}\n\n{crashed}\n\nExtension modules: zmq"
    assert shorten_crash(text, 1000) == f"{headline}\n\n{crashed}\n\n{deep}"[:1000]


@pytest.mark.parametrize("text", ["", "Timeout (0:00:01)!\nThread 0x01:\n  File", "one\n\ntwo"])
def test_shorten_crash_leaves_the_rest_in_order(text):
    """Without a thread that crashed, only the end goes."""
    assert shorten_crash(text, 1000) == text
    assert shorten_crash(text, 5) == text[:5]


def test_signals_of_the_terminal_do_not_end_the_core():
    """Ctrl-C and SIGTERM reach the whole group; the front decides what becomes of the core."""
    client = start()
    try:
        os.kill(client.pid, signal.SIGINT)
        os.kill(client.pid, signal.SIGTERM)
        client.add([spec("a", [5, 6], max_tokens=3)])
        assert receive_tokens(client, "a") == expected_tokens([5, 6], 3)
    finally:
        client.close()
    assert is_gone(client.pid)


PARENT = """
import os, signal, sys
from engine_fakes import build_fake_core, spec
from quire.core.config import EngineConfig
from quire.core.engine import core_process
from quire.core.engine.client import ProcessClient

if __name__ == "__main__":
    client = ProcessClient(EngineConfig(model="fake-model"), build_core=build_fake_core)
    print(client.pid, client._process.endpoints.directory, flush=True)
    if sys.argv[1] == "die":
        client.add([spec("a", [5], max_tokens=200)])
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("way", ["die", "forget"])
def test_parent_that_is_gone_takes_the_core_along(tmp_path, way):
    """Killed or merely forgetful, a parent leaves no engine process and no sockets."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(Path(__file__).parent), str(root), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, str(script), way],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == (-signal.SIGKILL if way == "die" else 0)
    pid, directory = done.stdout.split()
    wait_until(lambda: is_gone(int(pid)))
    wait_until(lambda: not Path(directory).exists())
