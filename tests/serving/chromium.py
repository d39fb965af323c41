"""A real Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from websockets.sync.client import ClientConnection, connect

PROGRAM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--remote-debugging-port=0", "--hide-scrollbars", "--mute-audio"),
)
PATIENCE_S = 40.0


class Page:
    """One tab. Every wait ends with the condition, not with a time."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self.problems: list[str] = []
        """Errors of scripts, and what the page's policy has blocked."""
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params) -> dict:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=PATIENCE_S))
            self._note(message)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def _note(self, message: dict) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(message["params"]["exceptionDetails"]))
        if (
            message.get("method") == "Log.entryAdded"
            and message["params"]["entry"]["level"] == "error"
        ):
            self.problems.append(json.dumps(message["params"]["entry"]))

    def run(self, script: str):
        """The value of an expression."""
        result = self.send(
            "Runtime.evaluate",
            expression=script,
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str):
        """The first true value of an expression."""
        give_up = time.monotonic() + PATIENCE_S
        while not (value := self.run(condition)):
            assert time.monotonic() < give_up, (
                f"{condition} stayed false: {self.run('document.body.innerText')}"
            )
        return value

    def open(self, url: str, width: int = 1280, height: int = 800, **features: str) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        media = [
            {"name": name.replace("_", "-"), "value": value} for name, value in features.items()
        ]
        self.send("Emulation.setEmulatedMedia", features=media)
        # The page before this one asks a server that may be gone.
        self.send("Page.navigate", url="about:blank")
        self.wait("document.URL === 'about:blank'")
        self.problems.clear()
        self.send("Page.navigate", url=url)
        self.wait(
            "document.readyState === 'complete' && document.querySelectorAll('#ideas button').length > 0"
        )

    def press(self, key: str, *, code: int = 0, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            fields = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            if text and kind == "keyDown":
                fields["text"] = text
            self.send("Input.dispatchKeyEvent", type=kind, **fields)

    def tab(self) -> None:
        self.press("Tab", code=9)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def enter(self) -> None:
        self.press("Enter", code=13, text="\r")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(
            base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        )


@contextmanager
def browser() -> Iterator[Page]:
    """A fresh browser with one tab."""
    folder = tempfile.mkdtemp(prefix="quire-chromium-")
    command = [PROGRAM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            with connect(_page_address(process), max_size=None) as socket:
                yield Page(socket)
        finally:
            process.kill()
            process.stderr.close()
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)


def _page_address(process: subprocess.Popen) -> str:
    """The browser says on stderr where it listens."""
    for line in process.stderr:
        if line.startswith("DevTools listening on "):
            host = line.split("//")[1].split("/")[0]
            break
    else:
        raise AssertionError("Chromium did not start")
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up:
        targets = httpx.get(f"http://{host}/json", trust_env=False).json()
        pages = [one["webSocketDebuggerUrl"] for one in targets if one["type"] == "page"]
        if pages:
            return pages[0]
    raise AssertionError("Chromium has no page")
