"""`quire top`: what a running server does, live in the terminal."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quire.core.errors import ConfigError
from quire.core.serving.cli.console import out, size
from quire.core.serving.cli.errors import require_extra

if TYPE_CHECKING:
    from rich.console import RenderableType

_BARS = " ▁▂▃▄▅▆▇█"
_HISTORY = 60


def top(
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(help="What the server asks for.")] = None,
    interval_s: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, print, and end.")] = False,
) -> None:
    """Watch a running server: load, speed, cache, device. Ctrl-C ends."""
    require_extra("bench", "httpx")
    from rich.live import Live

    view = TopView(url.rstrip("/"))
    console = out()
    if once:
        view.add(look(view.url, api_key), time.monotonic())
        console.print(view.render())
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            view.add(look(view.url, api_key), time.monotonic())
            live.update(view.render(), refresh=True)
            time.sleep(interval_s)


def look(url: str, api_key: str | None) -> dict[str, Any]:
    """What `/v1/server` says now. Raises: ConfigError if no server answers there."""
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(f"{url}/v1/server", headers=headers, timeout=10.0)
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise ConfigError(f"{url} asks for an API key; give --api-key")
        response.raise_for_status()
        found = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ConfigError(f"no Quire server answers at {url}: {error}") from error
    return dict(found)


@dataclass(slots=True)
class TopView:
    """The last minute of one server."""

    url: str
    facts: dict[str, Any] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)
    """Generated tokens a second, oldest first."""
    _before: tuple[float, int] | None = None

    def add(self, facts: dict[str, Any], now_s: float) -> None:
        """Takes note of one look."""
        self.facts = facts
        number = int(facts["statistics"]["num_output_tokens"])
        if self._before is not None:
            before_s, before = self._before
            # A restarted engine counts from nothing.
            self.speeds.append(max(0, number - before) / max(now_s - before_s, 1e-9))
            del self.speeds[:-_HISTORY]
        self._before = (now_s, number)

    def render(self) -> RenderableType:
        """The frame that is shown."""
        from rich.panel import Panel
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        for name, value in self.rows():
            grid.add_row(f"[dim]{name}[/dim]", value)
        model = self.facts["model"]["name"]
        return Panel(
            grid, title=f"quire top: {model} at {self.url}", title_align="left", expand=False
        )

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each line."""
        facts, now = self.facts, self.facts["statistics"]
        model, device = facts["model"], facts["device"]
        asked, hit = now["num_prompt_tokens"], now["num_cached_prompt_tokens"]
        memory = ", ".join(f"{name} {size(n)}" for name, n in device["memory_bytes"].items())
        speed = f"{self.speeds[-1]:,.0f} tokens/s {sparkline(self.speeds)}" if self.speeds else "-"
        return [
            ("state", f"{facts['state']}, {facts['num_restarts']} restarts"),
            ("model", f"{model['architecture']}, {model['dtype']}"),
            ("device", f"{device['backend']} ({device['name']})"),
            ("memory", memory or "-"),
            ("requests", f"{now['num_running']} running, {now['num_waiting']} waiting"),
            ("generation", speed),
            ("KV cache", f"{gauge(now['cache_usage'])} of {device['num_cache_tokens']:,} tokens"),
            ("prefix hits", gauge(hit / asked if asked else 0.0)),
            ("tokens", f"{asked:,} in, {now['num_output_tokens']:,} out"),
            ("preemptions", f"{now['num_preemptions']:,}"),
        ]


def sparkline(values: list[float]) -> str:
    """One character a value, its height against the largest."""
    most = max(values, default=0.0) or 1.0
    return "".join(_BARS[round(value / most * (len(_BARS) - 1))] for value in values)


def gauge(part: float, width: int = 20) -> str:
    """A bar and a percentage; `part` is from 0 to 1."""
    filled = round(min(max(part, 0.0), 1.0) * width)
    return f"{'█' * filled}{'░' * (width - filled)} {part:.1%}"
