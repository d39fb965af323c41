"""An engine of a comparison in a process of its own: threads and crashes are its alone.

The parent writes loads as lines of JSON and reads outcomes; the first line says that it is ready.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quire.benchmarks.peer_engines import DETERMINISTIC, PEERS, QUIRE, Outcome
from quire.benchmarks.workloads import Work

_PATIENCE_S = 900.0
"""A load that takes longer ends its engine."""


class PeerError(Exception):
    """An engine did not start, ended, or took too long; the text says which and why."""


class PeerProcess:
    """One engine; to be closed."""

    def __init__(self, name: str, directory: Path, precision: str, threads: int) -> None:
        """Starts to load the model, and does not wait for it."""
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        arguments = [name, str(directory), precision, str(threads)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "quire.benchmarks.peer_process", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # whatever it starts ends with it
        )

    def wait_ready(self) -> None:
        """Raises: PeerError if it does not load the model."""
        self._receive()

    def run(self, works: Sequence[Work]) -> Outcome:
        """One load. Raises: PeerError."""
        assert self._process.stdin is not None
        line = json.dumps([asdict(work) for work in works]) + "\n"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except OSError as error:
            raise PeerError(self._last_words("ended")) from error
        return Outcome(**self._receive())

    def close(self) -> None:
        """Ends it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _receive(self) -> dict[str, Any]:
        stream = self._process.stdout
        assert stream is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            if not selector.select(_PATIENCE_S):
                raise PeerError(f"took longer than {_PATIENCE_S:.0f} s")
        line = stream.readline()
        if not line:
            raise PeerError(self._last_words(f"ended with status {self._process.wait()}"))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _last_words(self, what: str) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{what}: {lines[-1]}" if lines else what


def main(name: str, directory: str, precision: str, threads: str) -> None:
    """The child: one engine, loads from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints must not stand between our lines

    def answer(document: dict[str, Any]) -> None:
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    peer = next(p for p in (QUIRE, DETERMINISTIC, *PEERS) if p.name == name)
    try:
        run = peer.start(Path(directory), precision, int(threads))
        answer({})
        for line in sys.stdin:
            answer(asdict(run([Work(**work) for work in json.loads(line)])))
    # Whatever another project raises is what the table has to say.
    except Exception as error:
        answer({"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})


if __name__ == "__main__":
    main(*sys.argv[1:])
