"""The process that renders chat templates, from outside: started when needed, killed when slow."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from quire.core.errors import ConfigError

_PROGRAM = Path(__file__).with_name("template_renderer.py")
_START_LIMIT_S = 60.0


class TemplateFailedError(Exception):
    """A template did not become a text, and why."""


class TemplateProcess:
    """Renders one template at a time. May be used from several threads."""

    def __init__(self, *, time_limit_s: float, max_chars: int) -> None:
        """Starts nothing yet."""
        self._time_limit_s = time_limit_s
        self._max_chars = max_chars
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closer: weakref.finalize[..., Any] | None = None

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The text. `variables` must be JSON.

        Raises: TemplateFailedError, also for a template that exceeds a limit; the next call
        is not harmed. ConfigError if the renderer cannot be started.
        """
        request = {
            "template": template,
            "variables": variables,
            "time_limit_s": self._time_limit_s,
            "max_chars": self._max_chars,
        }
        with self._lock:
            reply = self._ask(self._running(), request)
        if "error" in reply:
            raise TemplateFailedError(reply["error"])
        return str(reply["text"])

    def close(self) -> None:
        """Ends the process. A later `render` starts another."""
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = _start()
            self._closer = weakref.finalize(self, _stop, self._process)
        return self._process

    def _ask(self, process: subprocess.Popen[bytes], request: dict[str, Any]) -> dict[str, Any]:
        from quire.core.engine.template_renderer import read_message, write_message

        assert process.stdin is not None, process
        assert process.stdout is not None, process
        reply: dict[str, Any] | None
        alarm = threading.Timer(self._time_limit_s, process.kill)
        alarm.start()
        try:
            write_message(process.stdin, request)
            reply = read_message(process.stdout)
        except OSError:  # it died while we wrote
            reply = None
        finally:
            alarm.cancel()
        if reply is not None:
            return reply
        self._end()
        return {"error": f"more than {self._time_limit_s:g} s, or a crash of the renderer"}

    def _end(self) -> None:
        if self._closer is not None:
            self._closer()
        self._process = self._closer = None


def _start() -> subprocess.Popen[bytes]:
    try:
        from quire.core.engine.template_renderer import read_message
    except ImportError as error:
        raise ConfigError(
            f"chat templates need jinja2, which cannot be imported: {error}; pip install jinja2"
        ) from error
    # -P: the folder of the program is no place to import from.
    # A session of its own: Ctrl-C is not meant for it.
    process = subprocess.Popen(  # noqa: S603 - our own program, no shell
        [sys.executable, "-P", str(_PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None, process
    alarm = threading.Timer(_START_LIMIT_S, process.kill)
    alarm.start()
    try:
        is_ready = read_message(process.stdout) is not None
    finally:
        alarm.cancel()
    if not is_ready:
        _stop(process)
        raise ConfigError("the renderer of chat templates did not start; see its messages above")
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # what was not written has no reader any more
                continue
