"""What users of CUDA, ROCm and XPU are told when something is wrong: a typed error with the remedy.

Through the real engine and the real backends, on a stand-in for the driver and torch's part of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from accelerator_stand_in import KINDS, StandIn
from test_engine_answers import LENGTHS, SETTINGS, run, tokens_of
from tiny_models import make_tiny_model

from quire import LLM
from quire.backends.torch_accelerator import Found
from quire.core.discovery import choose_device
from quire.core.errors import (
    ConfigError,
    DeviceError,
    DeviceLost,
    DeviceOutOfMemory,
    EngineDeadError,
)

PROGRAM = Path(__file__).parent / "serve_accelerator.py"
VENDORS = ("cuda", "rocm", "xpu")
DRIVER = {"cuda": "update NVIDIA's driver", "rocm": "amdgpu driver", "xpu": "Intel's GPU driver"}
INSTALL = {"cuda": "whl/cu128", "rocm": "whl/rocm6.4", "xpu": "whl/xpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """The tokens of a device that does not fail."""
    with LLM(model=str(model), device="cpu", **SETTINGS) as llm:
        return tokens_of(run(llm))


def start(model: Path, name: str, **settings: object) -> LLM:
    return LLM(model=str(model), device=name, **{**SETTINGS, "max_num_seqs": 4, **settings})


@pytest.mark.parametrize("name", VENDORS)
def test_stand_in_that_does_not_fail_serves_the_tokens_of_the_cpu(
    model: Path, expected: list[list[int]], name: str
) -> None:
    """Eagerly and from recordings: what the other tests provoke is provoked in a sound engine."""
    with StandIn(name) as machine, start(model, name) as llm:
        assert tokens_of(run(llm)) == expected
        llm.warm_up()
        assert tokens_of(run(llm)) == expected
        assert machine.num_replays > 0


def test_torch_that_records_nothing_on_a_device_has_its_steps_run_eagerly(
    model: Path, expected: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """As on XPU before torch knew graphs of it: claimed as it is, and no failure each time."""
    with StandIn("xpu, torch without graphs") as machine, start(model, "xpu") as llm:
        llm.warm_up()
        assert tokens_of(run(llm)) == expected
        assert machine.num_graphs == 0
    assert not caplog.text


# --- no device, or one that torch and its driver cannot use ---------------------------------------


@pytest.mark.parametrize("name", VENDORS)
def test_no_device_is_a_config_error_with_the_remedy(model: Path, name: str) -> None:
    """What the probe of this vendor says where nothing is found."""
    with pytest.raises(ConfigError, match=f"device '{name}' was asked for") as caught:
        start(model, name)
    assert any(word in str(caught.value) for word in ("install", "start it with"))


@pytest.mark.parametrize("name", VENDORS)
def test_wheel_for_another_device_is_a_config_error_with_the_command(
    model: Path, name: str
) -> None:
    """The device is there and torch was built without it."""
    wheel = {"__version__": "2.11.0+cpu"}
    with StandIn(name, build=wheel), pytest.raises(ConfigError, match="built without") as caught:
        start(model, name)
    assert KINDS[name].device.name in str(caught.value)
    assert INSTALL[name] in str(caught.value)


def test_driver_that_says_it_is_too_old_is_a_config_error_before_anything_is_opened(
    model: Path,
) -> None:
    """NVIDIA's driver tells what it serves, so nobody waits for torch to fail."""
    with (
        StandIn("cuda", runtime=(11, 4)) as machine,
        pytest.raises(ConfigError, match=r"serves CUDA 11\.4 .* needs 12\.8") as caught,
    ):
        start(model, "cuda")
    assert DRIVER["cuda"] in str(caught.value)
    assert machine.taken_bytes == 0


@pytest.mark.parametrize("name", VENDORS)
def test_driver_too_old_for_torch_is_a_device_error_with_the_remedy(model: Path, name: str) -> None:
    """Where the driver does not tell, torch does, when the device is opened."""
    with StandIn(name, no_driver=True), pytest.raises(DeviceError, match=DRIVER[name]) as caught:
        start(model, name)
    assert type(caught.value) is DeviceError
    assert str(KINDS[name].no_driver).partition("\n")[0] in str(caught.value)


@pytest.mark.parametrize("name", VENDORS)
def test_device_that_torch_has_no_code_for_is_a_device_error_with_the_remedy(
    model: Path, name: str
) -> None:
    """A driver that is new enough does not help, and neither does a restart."""
    with StandIn(name, without_code=True), pytest.raises(DeviceError, match="quire doctor"):
        start(model, name)


@pytest.mark.parametrize("name", VENDORS)
def test_device_that_is_left_unused_is_told_where_another_is_chosen(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody serves on the host by mistake, with the accelerator idle beside it."""
    with StandIn(name, build={"__version__": "2.11.0+cpu"}):
        assert choose_device().name == "cpu"
    assert f"{name} is left unused: {KINDS[name].device.name}" in caplog.text
    assert INSTALL[name] in caplog.text


def test_device_that_is_not_there_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    """Most machines have no accelerator of most vendors."""
    with StandIn("cuda", found=Found(problem="no driver", remedy="install one")):
        choose_device()
    assert not caplog.text


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VENDORS)
@pytest.mark.parametrize(
    ("memory_bytes", "tag", "remedy"),
    [
        (0, "context", "end the processes that hold it"),
        (1 << 10, "weights", "a smaller dtype or model|lower device_memory_fraction"),
        (800_000, "cache", "lower device_memory_fraction or cache_memory_bytes"),
    ],
)
def test_memory_refused_at_start_is_typed_and_ends_the_start(
    model: Path, name: str, memory_bytes: int, tag: str, remedy: str
) -> None:
    """By the driver's own words or torch's; what was asked for says what to lower."""
    with (
        StandIn(name, memory_bytes=memory_bytes),
        pytest.raises(DeviceOutOfMemory, match=remedy) as caught,
    ):
        start(model, name, cache_memory_bytes=64 << 20)
    assert caught.value.tag == tag


@pytest.mark.parametrize("name", VENDORS)
def test_memory_refused_at_capture_leaves_serving_eager_with_one_warning(
    model: Path, expected: list[list[int]], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver's complaint about the broken recording hides nothing and kills nobody."""
    with StandIn(name, refused_at_capture=True) as machine, start(model, name) as llm:
        llm.warm_up()
        assert tokens_of(run(llm)) == expected
    assert machine.num_graphs == machine.num_replays == 0
    (warning,) = [r.message for r in caplog.records if "run eagerly" in r.message]
    assert "refused memory for graphs" in warning
    assert "lower device_memory_fraction" in warning


# --- a device that is gone ------------------------------------------------------------------------


@pytest.mark.parametrize("name", VENDORS)
@pytest.mark.parametrize("at", [35, 62])
def test_device_lost_in_mid_step_ends_all_requests_with_its_typed_error(
    model: Path, name: str, at: int
) -> None:
    """All that are in flight, those who come later, and nothing else when the engine is closed."""
    with StandIn(name, lost_at_launch=at) as machine, start(model, name) as llm:
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="reset the device") as raised:
                run(llm)
            assert raised.value.root_cause.startswith(DeviceLost.__name__)
            assert str(KINDS[name].lost).partition("\n")[0] in raised.value.root_cause
        assert llm._client._core.scheduler.num_running <= len(LENGTHS)
    assert machine.is_lost


@pytest.mark.parametrize("name", VENDORS)
def test_device_lost_in_a_recording_is_no_recording_that_failed(model: Path, name: str) -> None:
    """Nothing goes on eagerly: the next request meets a dead engine that says of what."""
    with StandIn(name, lost_at_capture=True), start(model, name) as llm:
        with pytest.raises(DeviceLost, match=r"graphs.*reset the device"):
            llm.warm_up()
        with pytest.raises(EngineDeadError, match=DeviceLost.__name__):
            run(llm)


# --- as a server ----------------------------------------------------------------------------------


def serve(model: Path, name: str, faults: dict[str, object], *options: str) -> subprocess.Popen:
    """`quire serve` on such a machine."""
    command = [sys.executable, str(PROGRAM), "serve", str(model)]
    settings = ("--device", name, "--port", "0", "--dtype", "float32", "--max-num-seqs", "4")
    sizes = ("--cache-memory-bytes", "2M", "--max-model-len", "128")
    return subprocess.Popen(
        [*command, *settings, *sizes, *options],
        env={**os.environ, "STAND_IN": json.dumps([name, faults])},
        stderr=subprocess.PIPE,
        text=True,
    )


def url_of(process: subprocess.Popen, lines: list[str] | None = None) -> str:
    """Where it serves, once it does. What it says before is added to `lines`."""
    lines = [] if lines is None else lines
    for line in process.stderr:
        if line.startswith("serving "):
            return line.split()[-1].removesuffix("/v1")
        lines.append(line)
    raise AssertionError("".join(lines))


def ask(url: str, num: int) -> str:
    """What a stream of a client ends with."""
    body = {"prompt": f"{num} a", "max_tokens": 100, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        return response.read().decode()


@pytest.mark.slow
@pytest.mark.parametrize("name", VENDORS)
def test_server_whose_device_is_lost_tells_all_and_ends_as_its_supervisor_expects(
    model: Path, name: str
) -> None:
    """Every stream gets the typed error, health is 503 with the cause, and the status is 1."""
    stays = ("--on-engine-death", "stay")
    with serve(model, name, {"lost_at_launch": 60}, *stays) as process:
        try:
            url = url_of(process)
            with ThreadPoolExecutor(6) as pool:
                said = list(pool.map(ask, [url] * 6, range(6)))
            first_line = str(KINDS[name].lost).partition("\n")[0]
            assert all(DeviceLost.__name__ in text and first_line in text for text in said), said
            assert all("reset the device" in text for text in said)
            health = httpx.get(f"{url}/health")
            assert health.status_code == 503
            assert first_line in health.text
            assert httpx.get(f"{url}/ready").status_code == 503
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 1
        finally:
            process.kill()


@pytest.mark.slow
def test_server_whose_device_is_lost_ends_by_itself_where_exit_is_asked_for(model: Path) -> None:
    """A supervisor outside starts another; nothing waits for a signal."""
    ends = ("--on-engine-death", "exit")
    with serve(model, "cuda", {"lost_at_launch": 60}, *ends) as process:
        try:
            assert DeviceLost.__name__ in ask(url_of(process), 0)
            assert process.wait(60) == 1
            assert "unspecified launch failure" in process.stderr.read()
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "faults", "status", "said"),
    [
        ("cuda", {"runtime": [11, 4]}, 2, "update NVIDIA's driver"),
        ("rocm", {"no_driver": True}, 1, "amdgpu driver"),
        ("xpu", {"memory_bytes": 0}, 1, "end the processes that hold it"),
        ("rocm", {"memory_bytes": 1024}, 1, "a smaller dtype or model"),
    ],
)
def test_server_that_cannot_start_says_why_in_one_message_and_ends(
    model: Path, name: str, faults: dict[str, object], status: int, said: str
) -> None:
    """No traceback: what was asked, what is so, what to do."""
    with serve(model, name, faults) as process:
        _, stderr = process.communicate(timeout=100)
    assert process.returncode == status, stderr
    assert said in stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_server_refused_memory_at_capture_serves_on_and_warns_once(model: Path) -> None:
    """The operator reads it in the log of the server, the users notice nothing."""
    before: list[str] = []
    with serve(model, "cuda", {"refused_at_capture": True}) as process:
        try:
            url = url_of(process, before)
            texts = [ask(url, 0) for _ in range(3)]
            assert all('"finish_reason":"length"' in text for text in texts)
            assert httpx.get(f"{url}/health").status_code == 200
            process.send_signal(signal.SIGTERM)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    said = "".join(before) + stderr
    assert said.count("run eagerly, without a recording") == 1, said
