"""Charts of a measurement: a page of SVG that needs nothing, or PNG with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from quire.core.errors import ConfigError
from quire.core.serving.cli.bench.load import Measurement

_WIDTH, _HEIGHT, _MARGIN = 640, 240, 46
_BINS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One curve: y over x, both as long as each other."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    y: Sequence[float]


def make_plots(seen: Measurement) -> list[Plot]:
    """Distributions of the times, and tokens a second over the run."""
    good = [record for record in seen.records if not record.error]
    names = {
        "time_to_first_token": "Time to first token",
        "inter_token": "Between tokens",
        "request": "Whole request",
    }
    plots = [
        _cumulative(title, [value * 1000.0 for r in good for value in r.times_s(name)])
        for name, title in names.items()
    ]
    return [plot for plot in [*plots, _throughput(seen)] if plot.x]


def write_plots(
    path: Path, title: str, plots: Sequence[Plot], numbers: Mapping[str, float | int]
) -> None:
    """As `.html` or `.png`. Raises: ConfigError for another name, or PNG without matplotlib."""
    if path.suffix == ".html":
        path.write_text(_page(title, plots, numbers), encoding="utf-8")
    elif path.suffix == ".png":
        _write_png(path, title, plots)
    else:
        raise ConfigError(f"plots cannot be written to {path}; name a file .html or .png")


def _cumulative(title: str, values_ms: list[float]) -> Plot:
    ordered = sorted(values_ms)
    parts = [(index + 1) / len(ordered) * 100.0 for index in range(len(ordered))]
    return Plot(title=title, x_label="ms", y_label="% at most", x=ordered, y=parts)


def _throughput(seen: Measurement) -> Plot:
    """Chunks a second, by when they came."""
    times_s = sorted(time_s for record in seen.records for time_s in record.chunk_times_s)
    if len(times_s) < 2 or times_s[-1] == times_s[0]:
        return Plot(title="Throughput", x_label="s", y_label="chunks/s", x=(), y=())
    begin_s, width_s = times_s[0], (times_s[-1] - times_s[0]) / _BINS
    counts = [0] * _BINS
    for time_s in times_s:
        counts[min(int((time_s - begin_s) / width_s), _BINS - 1)] += 1
    return Plot(
        title="Throughput",
        x_label="s",
        y_label="chunks/s",
        x=[(index + 0.5) * width_s for index in range(_BINS)],
        y=[count / width_s for count in counts],
    )


def _page(title: str, plots: Sequence[Plot], numbers: Mapping[str, float | int]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{value:,.2f}</td></tr>"
        for name, value in numbers.items()
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
        "<meta name=viewport content='width=device-width'><style>"
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1340px;margin:24px auto;padding:0 16px;"
        "color:#211d18;background:#faf7f1}figure{display:inline-block;margin:8px;width:640px;"
        "max-width:100%;background:#fff;border:1px solid #e2dace;border-radius:12px}svg{width:100%}"
        "th{text-align:left;font-weight:400;padding-right:24px}td{text-align:right}</style>"
        f"<h1>{escape(title)}</h1>{''.join(map(_svg, plots))}<table>{rows}</table></html>\n"
    )


def _svg(plot: Plot) -> str:
    x_max, y_max = max(plot.x) or 1.0, max(plot.y) or 1.0
    right, bottom = _WIDTH - _MARGIN, _HEIGHT - _MARGIN
    points = " ".join(
        f"{_MARGIN + x / x_max * (right - _MARGIN):.1f},"
        f"{bottom - y / y_max * (bottom - _MARGIN):.1f}"
        for x, y in zip(plot.x, plot.y, strict=True)
    )
    marks = "".join(
        f"<text x={_MARGIN + part * (right - _MARGIN):.0f} y={bottom + 18} text-anchor=middle>"
        f"{x_max * part:.4g}</text><text x={_MARGIN - 6} y={bottom - part * (bottom - _MARGIN):.0f}"
        f" text-anchor=end>{y_max * part:.4g}</text>"
        for part in (0.0, 0.5, 1.0)
    )
    label = f"{plot.title}, {plot.y_label} over {plot.x_label}"
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{escape(label)}" '
        f'font-size=12 fill="#625a50"><text x={_MARGIN} y=24 font-size=15 fill="#211d18">'
        f"{escape(label)}</text>{marks}<path d='M{_MARGIN} {_MARGIN}V{bottom}H{right}' fill=none "
        f'stroke="#8f8578"/><polyline points="{points}" fill=none stroke="#9c3f25" '
        "stroke-width=2 /></svg></figure>"
    )


def _write_png(path: Path, title: str, plots: Sequence[Plot]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            'PNG needs matplotlib; run: pip install "quire[plots]", or write .html'
        ) from error
    figure = Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(title)
    for index, plot in enumerate(plots):
        axes = figure.add_subplot(2, 2, index + 1)
        axes.plot(plot.x, plot.y, color="#9c3f25")
        axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label, ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
