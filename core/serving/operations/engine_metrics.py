"""The engine's own numbers as families of Prometheus: counters, memory, stages of the start."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from quire.core.engine.async_engine import AsyncEngine
from quire.core.engine.facts import EngineStatistics

_COUNTERS = (
    ("prompt_tokens", "Prompt tokens scheduled.", "num_prompt_tokens"),
    ("generation_tokens", "Tokens generated.", "num_output_tokens"),
    ("prefix_cache_queries", "Prompt tokens looked up.", "num_prompt_tokens"),
    ("prefix_cache_hits", "Prompt tokens found.", "num_cached_prompt_tokens"),
    ("num_preemptions", "Requests put back to make room.", "num_preemptions"),
    ("engine_steps", "Steps of the engine.", "num_steps"),
    ("failed_steps", "Steps that ran out of memory.", "num_failed_steps"),
)
"""Name, text, and the field of EngineStatistics."""


@dataclass(frozen=True, slots=True)
class CoreUse:
    """What the process of the engine core takes from the machine."""

    cpu_s: float
    resident_bytes: int


class EngineCollector(Collector):
    """The numbers as the engine told them last. A restart does not set counters back."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._labels = [engine.facts.served_model_name]
        self._statistics = EngineStatistics()
        self._base: dict[str, float] = {}
        """What engines that are gone had counted."""
        self._num_restarts = 0
        self._is_up = True

    def update(self, statistics: EngineStatistics | None, *, is_up: bool) -> None:
        """Remembers what the next scrape tells; None: as before."""
        self._statistics = statistics or self._statistics
        self._is_up = is_up

    def follow(self, engine: AsyncEngine) -> None:
        """Another engine counts from now on, beginning at nothing."""
        for _, _, field in _COUNTERS:
            gone = getattr(self._statistics, field)
            self._base[field] = self._base.get(field, 0.0) + gone
        self._engine, self._statistics = engine, EngineStatistics()
        self._num_restarts += 1

    def collect(self) -> Iterator[Metric]:
        """One family for each number."""
        now = self._statistics
        yield self._gauge("num_requests_running", "Requests in the running batch.", now.num_running)
        yield self._gauge("num_requests_waiting", "Requests that wait to run.", now.num_waiting)
        yield self._gauge(
            "kv_cache_usage_perc", "Part of the cache that is held, 1 is all.", now.cache_usage
        )
        yield self._gauge("engine_up", "1 while the engine lives.", float(self._is_up))
        for name, text, field in _COUNTERS:
            value = self._base.get(field, 0.0) + getattr(now, field)
            yield self._counter(name, text, value)
        yield self._counter(
            "engine_restarts", "Engines that were started after one died.", self._num_restarts
        )
        yield from self._machine()

    def _machine(self) -> Iterator[Metric]:
        facts = self._engine.facts
        yield self._labelled(
            "memory_bytes", "Memory of the device.", "tag", self._statistics.memory_bytes
        )
        yield self._labelled(
            "startup_seconds", "Of each stage of the engine's start.", "stage", facts.startup_s
        )
        use = core_use(self._engine.core_pid)
        if use is not None:
            # Its rate while nothing runs is what an idle engine costs.
            yield self._counter("core_cpu_seconds", "CPU time of the engine's process.", use.cpu_s)
            yield self._gauge(
                "core_resident_memory_bytes", "Memory of the engine's process.", use.resident_bytes
            )

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(f"quire:{name}", text, labels=["model_name"])
        gauge.add_metric(self._labels, value)
        return gauge

    def _counter(self, name: str, text: str, value: float) -> Metric:
        counter = CounterMetricFamily(f"quire:{name}", text, labels=["model_name"])
        counter.add_metric(self._labels, value)
        return counter

    def _labelled(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        gauge = GaugeMetricFamily(f"quire:{name}", text, labels=["model_name", "device", label])
        for key, value in values.items():
            gauge.add_metric([*self._labels, self._engine.facts.device, key], value)
        return gauge


def core_use(pid: int) -> CoreUse | None:
    """CPU time and memory of a process; None where the system does not tell, or it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # The name in brackets may hold anything: what counts begins after it.
    fields = text.rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return CoreUse(
        cpu_s=ticks / os.sysconf("SC_CLK_TCK"),
        resident_bytes=int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
    )
