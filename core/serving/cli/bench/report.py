"""What every measurement tells: its numbers, and on what and how they came about."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.core.serving.cli.console import err, out, table

if TYPE_CHECKING:
    from quire.core.engine.facts import EngineFacts

PERCENTILES = (50, 90, 95, 99)
_PACKAGES = ("quire", "torch", "triton", "transformers", "numpy")


def distribution(name: str, values_s: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles of times, in milliseconds; empty where there are none."""
    import numpy as np

    if not values_s:
        return {}
    values_ms = np.asarray(values_s) * 1000.0
    found = {f"{name}_mean_ms": float(values_ms.mean())}
    for percentile in PERCENTILES:
        found[f"{name}_p{percentile}_ms"] = float(np.percentile(values_ms, percentile))
    return found


def publish(
    title: str,
    results: Mapping[str, float | int],
    setup: Mapping[str, Any],
    write_json: Path | None,
) -> None:
    """Prints the results as a table and writes them, with the setup and the machine, to a file."""
    rows = [(name, _shown(value)) for name, value in results.items()]
    out().print(table(title, ("what", "value"), rows))
    if write_json is None:
        return
    record = {
        "benchmark": title,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "machine": machine(),
        "setup": dict(setup),
        "results": dict(results),
    }
    write_json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    err().print(f"wrote {write_json}", style="dim", markup=False)


def engine_setup(facts: EngineFacts) -> dict[str, Any]:
    """The engine's part of the setup."""
    return {
        "model": facts.model,
        "architecture": facts.architecture,
        "num_parameters": facts.num_parameters,
        "dtype": facts.dtype,
        "device": facts.device,
        "device_name": facts.device_name,
        "num_cache_tokens": facts.num_cache_tokens,
        "providers": dict(facts.providers),
    }


def machine() -> dict[str, Any]:
    """The host and the versions of what counts."""
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
