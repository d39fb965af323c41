"""Numbers of the texts that became vectors, labels or scores."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram

_LATENCY_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
_LABELS = ("model_name", "task")


class PoolingMetrics:
    """How many texts, how long they were, and how long each took, by task."""

    def __init__(self, registry: CollectorRegistry, model: str, tasks: Sequence[str]) -> None:
        """`tasks`: those that tell 0 from the beginning."""
        self._model = model
        self._requests = Counter(
            "quire:pooling_requests",
            "Texts that became numbers, by the task and whether they did.",
            (*_LABELS, "outcome"),
            registry=registry,
        )
        self._tokens = Counter(
            "quire:pooling_prompt_tokens", "Tokens of those texts.", _LABELS, registry=registry
        )
        self._latency = Histogram(
            "quire:pooling_request_latency_seconds",
            "From arrival to the numbers of one text.",
            _LABELS,
            registry=registry,
            buckets=_LATENCY_S,
        )
        for task in tasks:
            self._requests.labels(model, task, "success")
            self._tokens.labels(model, task)
            self._latency.labels(model, task)

    @contextmanager
    def observed(self, task: str) -> Iterator[None]:
        """Takes the time of one text; an exception counts as a failure, a cancellation as abort."""
        begun_s = time.monotonic()
        outcome = "abort"
        try:
            yield
            outcome = "success"
            self._latency.labels(self._model, task).observe(time.monotonic() - begun_s)
        except Exception:
            outcome = "error"
            raise
        finally:
            self._requests.labels(self._model, task, outcome).inc()

    def count_tokens(self, task: str, number: int) -> None:
        """Counts the tokens of one text."""
        self._tokens.labels(self._model, task).inc(number)
