"""The server as a process: it binds, serves, drains and ends as whoever runs it expects."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from asking import error_of

from quire.core.errors import ConfigError
from quire.core.serving.lifecycle import bind
from quire.core.serving.settings import ServerSettings

PROGRAM = Path(__file__).parent / "serve_fake.py"
HELD = {"prompt": "hold me", "stream": True, "max_tokens": 5}


class Served:
    """A server process and a client of it."""

    def __init__(self, process: subprocess.Popen, url: str) -> None:
        self.process, self.url = process, url
        self.client = httpx.Client(base_url=url, timeout=20)

    def ends(self, within_s: float = 15) -> int:
        return self.process.wait(within_s)


@contextmanager
def served(timeout_s: float = 20, **options) -> Iterator[Served]:
    with started(timeout_s, **options) as process:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), process.stderr.read()
        one = Served(process, url)
        with one.client:
            yield one


@contextmanager
def started(timeout_s: float = 20, **options) -> Iterator[subprocess.Popen]:
    command = [sys.executable, str(PROGRAM), "0", str(timeout_s), json.dumps(options)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline().strip() == "bound", process.stderr.read()
            yield process
        finally:
            process.kill()


@contextmanager
def held_stream(one: Served) -> Iterator[Iterator[str]]:
    """A stream that has begun and waits."""
    with one.client.stream("POST", "/v1/completions", json=HELD) as response:
        lines = response.iter_lines()
        assert "H" in next(lines)
        yield lines


@pytest.mark.skipif(shutil.which("openssl") is None, reason="NO OPENSSL: nobody makes the keys")
def test_certificate_makes_the_server_speak_tls(tmp_path):
    """With a certificate and its key, clients that trust it are answered, and no others."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    name = ["-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*make, *files, *name], check=True, capture_output=True, timeout=120)
    with started(ssl_certfile=str(certificate), ssl_keyfile=str(key)) as process:
        url = process.stdout.readline().strip()
        assert url.startswith("https://127.0.0.1:"), process.stderr.read()
        trust = ssl.create_default_context(cafile=certificate)
        assert httpx.get(f"{url}/ready", verify=trust, timeout=20).status_code == 200
        with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
            httpx.get(f"{url}/ready", timeout=20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0


def test_sigterm_drains_then_ends_with_zero():
    """Readiness flips first, what is in flight finishes, nobody new is let in, and the status is 0."""
    with served() as one, held_stream(one) as lines, httpx.Client(base_url=one.url) as other:
        assert other.get("/ready").status_code == 200
        one.process.send_signal(signal.SIGTERM)
        while other.get("/ready").status_code == 200:
            pass
        assert other.get("/health").status_code == 200
        refused = other.post("/v1/completions", json={"prompt": "release"})
        assert error_of(refused, 503)["code"] == "shutting_down"
        assert one.process.poll() is None
        # A second signal does not wait for the one that is held.
        one.process.send_signal(signal.SIGTERM)
        assert "".join(lines).endswith("data: [DONE]")
        assert one.ends() == 0


def test_sigterm_lets_requests_finish():
    """A request that ends within the bound is answered whole."""
    with served() as one, held_stream(one) as lines:
        with httpx.Client(base_url=one.url) as other:
            # Asked before the signal, answered by the same engine, which lets the held one go.
            assert other.post("/v1/completions", json={"prompt": "release"}).status_code == 200
        one.process.send_signal(signal.SIGTERM)
        assert '"finish_reason":"length"' in "".join(lines)
        assert one.ends() == 0


async def test_sigterm_under_load_loses_no_accepted_request():
    """Every request that was let in before the signal, streamed or whole, is answered whole."""
    with served() as one:
        async with httpx.AsyncClient(base_url=one.url, timeout=20) as client:
            bodies = [{**HELD, "stream": number % 2 == 0} for number in range(40)]
            asked = [client.post("/v1/completions", json=body) for body in bodies]
            answers = [asyncio.ensure_future(each) for each in asked]
            running = f'num_requests_running{{model_name="fake"}} {len(bodies)}.0'
            while running not in (await client.get("/metrics")).text:
                pass
            one.process.send_signal(signal.SIGTERM)
            while (await client.get("/ready")).status_code == 200:
                pass
            one.process.send_signal(signal.SIGUSR1)
            for answer in await asyncio.gather(*answers):
                assert answer.status_code == 200
                assert '"finish_reason":"length"' in answer.text
        assert one.ends() == 0


def test_sigterm_aborts_after_the_bound():
    """A request that does not end in time is aborted, told so, and does not hold the process."""
    with served(timeout_s=0.3) as one, held_stream(one) as lines:
        one.process.send_signal(signal.SIGTERM)
        rest = "".join(lines)
        assert '"finish_reason":"abort"' in rest
        assert rest.endswith("data: [DONE]")
        assert one.ends() == 0


def test_sigint_ends_an_idle_server_with_zero():
    """Ctrl-C on a server that does nothing ends it at once and without a traceback."""
    with served() as one:
        assert one.client.get("/health").status_code == 200
        one.process.send_signal(signal.SIGINT)
        assert one.ends() == 0
        assert "Traceback" not in one.process.stderr.read()


def test_signal_while_loading_ends_with_zero():
    """A server that is told to end before its model is loaded ends, with status 0."""
    with started(model="never") as process:
        assert process.stdout.readline().strip() == "loading"
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0


def test_engine_death_ends_the_server_if_asked():
    """With on_engine_death=exit the process ends with 1, so that whoever watches it starts another."""
    with served(on_engine_death="exit") as one:
        assert one.client.post("/v1/completions", json={"prompt": "die"}).status_code == 503
        assert one.ends() == 1


def test_engine_death_leaves_the_server_answering():
    """With stay the server stays, and says that it is not healthy."""
    with served(on_engine_death="stay") as one:
        assert one.client.post("/v1/completions", json={"prompt": "die"}).status_code == 503
        assert one.client.get("/health").status_code == 503
        one.process.send_signal(signal.SIGTERM)
        assert one.ends() == 1


def test_client_that_leaves_frees_the_engine():
    """Over a real connection too, leaving a stream or a whole answer aborts it."""
    with served() as one:
        with held_stream(one):
            assert 'running{model_name="fake"} 1.0' in one.client.get("/metrics").text
        with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=one.url, timeout=0.3) as hasty:
            hasty.post("/v1/completions", json={"prompt": "hold me too"})
        while 'num_requests_running{model_name="fake"} 0.0' not in one.client.get("/metrics").text:
            pass


def test_taken_port_is_one_clear_line():
    """Who asks for a port that is taken reads which one, and what to do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"127.0.0.1:{port}: .*in use; choose another"
        ) as caught:
            bind("127.0.0.1", port)
    assert "\n" not in str(caught.value)


def test_unknown_host_is_one_clear_line():
    """An address that this machine does not have is told before anything is loaded."""
    with pytest.raises(ConfigError, match=r"cannot listen on 192.0.2.1:0"):
        bind("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"port": 70000}, "port"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"max_logprobs": -1}, "max_logprobs"),
        ({"shutdown_timeout_s": -1}, "shutdown_timeout_s"),
        ({"ssl_certfile": "x"}, "ssl_keyfile"),
        ({"api_keys": ("",)}, "API key"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, word):
    """A server is not started with settings that contradict themselves."""
    with pytest.raises(ConfigError, match=word):
        ServerSettings(**settings)
