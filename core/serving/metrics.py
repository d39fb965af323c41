"""Numbers for Prometheus, by the names of vLLM but for the prefix."""

from __future__ import annotations

import copy
import time
from collections.abc import Awaitable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

import quire
from quire.core.engine.async_engine import AsyncEngine, OutputKind
from quire.core.engine.pooling import POOLING_TASKS, PoolingOutput, PoolingTask
from quire.core.errors import EngineDeadError
from quire.core.outputs import CompletionOutput, RequestMetrics, RequestOutput
from quire.core.serving.operations.engine_metrics import EngineCollector
from quire.core.serving.operations.pooling_metrics import PoolingMetrics
from quire.core.serving.operations.record import RequestRecord

_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_WHOLE_REQUEST_S = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))


class ServerMetrics:
    """All numbers of one server, in a registry of its own."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.registry = CollectorRegistry()
        self._record: RequestRecord | None = None
        self._statistics = EngineCollector(engine)
        self.registry.register(self._statistics)
        ProcessCollector(registry=self.registry)
        self._set_build_info()
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_S
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of one output.", _BETWEEN_TOKENS_S
        )
        self.e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", _WHOLE_REQUEST_S
        )
        self.request_queue_time = self._histogram(
            "request_queue_time_seconds", "From arrival to the first step.", _WHOLE_REQUEST_S
        )
        self.request_prefill_time = self._histogram(
            "request_prefill_time_seconds",
            "From the first step to the first token.",
            _WHOLE_REQUEST_S,
        )
        self.request_decode_time = self._histogram(
            "request_decode_time_seconds", "From the first token to the last.", _WHOLE_REQUEST_S
        )
        self.request_inference_time = self._histogram(
            "request_inference_time_seconds", "From the first step to the last.", _WHOLE_REQUEST_S
        )
        self.request_time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean between the tokens of one output.",
            _BETWEEN_TOKENS_S,
        )
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Tokens of a prompt.", _TOKENS
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens of an output.", _TOKENS
        )
        facts = engine.facts
        tasks = [task for task in POOLING_TASKS if task in facts.tasks]
        self._pooling = PoolingMetrics(self.registry, facts.served_model_name, tasks)
        self._success = Counter(
            "quire:request_success",
            "Outputs that ended, by the reason for which they did.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )

    def observer(self, *, num_outputs: int, output_kind: OutputKind) -> RequestObserver:
        """Follows one prompt from now on."""
        return RequestObserver(
            self, num_outputs=num_outputs, output_kind=output_kind, record=self._record
        )

    async def pooled(self, task: PoolingTask, asked: Awaitable[PoolingOutput]) -> PoolingOutput:
        """What comes of one text, which is counted and timed. Raises: what `asked` does."""
        with self._pooling.observed(task):
            output = await asked
        self._pooling.count_tokens(task, output.num_prompt_tokens)
        if self._record is not None:
            self._record.num_prompt_tokens += output.num_prompt_tokens
            self._record.num_cached_tokens += output.num_cached_tokens
        return output

    def recording(self, record: RequestRecord) -> ServerMetrics:
        """The same numbers, with observers that also fill the record of one HTTP request."""
        view = copy.copy(self)
        view._record = record  # noqa: SLF001 - a copy of our own
        return view

    def follow(self, engine: AsyncEngine) -> None:
        """From now on the numbers are those of another engine; counters go on where they were."""
        self._engine = engine
        self._statistics.follow(engine)

    def count_finished(self, reason: str, number: int = 1) -> None:
        """Counts outputs that ended."""
        labels = (self._engine.facts.served_model_name, reason)
        self._success.labels(*labels).inc(number)

    async def expose(self) -> bytes:
        """Everything as text; a dead engine leaves its last numbers and `engine_up` 0."""
        try:
            self._statistics.update(await self._engine.statistics(), is_up=True)
        except EngineDeadError:
            self._statistics.update(None, is_up=False)
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            f"quire:{name}", text, ("model_name",), registry=self.registry, buckets=buckets
        )
        return histogram.labels(self._engine.facts.served_model_name)

    def _set_build_info(self) -> None:
        facts = self._engine.facts
        info = Gauge(
            "quire:build_info",
            "What serves: the value is always 1.",
            ("version", "model_name", "device", "device_name", "dtype"),
            registry=self.registry,
        )
        info.labels(
            quire.__version__, facts.served_model_name, facts.device, facts.device_name, facts.dtype
        ).set(1)


class RequestObserver:
    """Follows the outputs of one prompt and observes its times."""

    def __init__(
        self,
        metrics: ServerMetrics,
        *,
        num_outputs: int,
        output_kind: OutputKind,
        record: RequestRecord | None = None,
    ) -> None:
        self._metrics = metrics
        self._record = record
        self._num_open = num_outputs
        self._is_streamed = output_kind == "delta"
        self._arrival_s = time.monotonic()
        self._last_token_s: dict[int, float] = {}
        self._num_tokens: dict[int, int] = {}
        self._is_begun = False

    def observe(self, output: RequestOutput) -> None:
        """Takes note of an output that has just come."""
        now_s = time.monotonic()
        if not self._is_begun:
            self._is_begun = True
            self._begin(output, now_s)
        for child in output.outputs:
            if self._is_streamed:
                self._note_tokens(child, now_s)
            else:
                self._note_whole(child, output.metrics)
            if child.is_finished:
                self._finish(child)
        if self._num_open == 0 and output.is_finished:
            self._metrics.e2e_request_latency.observe(now_s - self._arrival_s)
            if output.metrics is not None:
                self._note_stages(output.metrics)

    def close(self) -> None:
        """Counts as aborted what has not ended."""
        if self._num_open > 0:
            self._metrics.count_finished("abort", self._num_open)
            if self._record is not None:
                self._record.finish_reasons["abort"] += self._num_open
            self._num_open = 0

    def _begin(self, output: RequestOutput, now_s: float) -> None:
        times = output.metrics
        self._metrics.request_prompt_tokens.observe(len(output.prompt_token_ids))
        first_s = now_s
        if times is not None and not self._is_streamed and times.first_token_time_s is not None:
            first_s = times.first_token_time_s
        self._metrics.time_to_first_token.observe(max(first_s - self._arrival_s, 0.0))
        if self._record is not None:
            self._record.num_prompt_tokens += len(output.prompt_token_ids)
            self._record.num_cached_tokens += output.num_cached_tokens
            if self._record.first_token_s is None:
                self._record.first_token_s = first_s
        if times is not None and times.first_scheduled_time_s is not None:
            waited_s = times.first_scheduled_time_s - times.arrival_time_s
            self._metrics.request_queue_time.observe(max(waited_s, 0.0))

    def _note_tokens(self, child: CompletionOutput, now_s: float) -> None:
        """Several tokens that come at once share the time since the last."""
        number = len(child.token_ids)
        if number == 0:
            return
        self._num_tokens[child.index] = self._num_tokens.get(child.index, 0) + number
        self._count_tokens(number)
        before_s = self._last_token_s.get(child.index)
        self._last_token_s[child.index] = now_s
        if before_s is not None:
            self._observe_gaps((now_s - before_s) / number, number)

    def _note_whole(self, child: CompletionOutput, times: RequestMetrics | None) -> None:
        """The mean gap stands for each, since an output that comes whole tells no more."""
        number = len(child.token_ids)
        self._num_tokens[child.index] = number
        self._count_tokens(number)
        if times is None or times.first_token_time_s is None or times.last_token_time_s is None:
            return
        if number > 1:
            span_s = max(times.last_token_time_s - times.first_token_time_s, 0.0)
            self._observe_gaps(span_s / (number - 1), number - 1)

    def _observe_gaps(self, gap_s: float, number: int) -> None:
        for _ in range(number):
            self._metrics.inter_token_latency.observe(gap_s)

    def _count_tokens(self, number: int) -> None:
        if self._record is not None:
            self._record.num_output_tokens += number

    def _note_stages(self, times: RequestMetrics) -> None:
        """The engine's own times of a prompt that has ended."""
        if self._record is not None:
            self._record.timings.append(times)
        begun_s, first_s, last_s = (
            times.first_scheduled_time_s,
            times.first_token_time_s,
            times.last_token_time_s,
        )
        if begun_s is None or first_s is None or last_s is None:
            return
        self._metrics.request_prefill_time.observe(max(first_s - begun_s, 0.0))
        self._metrics.request_decode_time.observe(max(last_s - first_s, 0.0))
        self._metrics.request_inference_time.observe(max(last_s - begun_s, 0.0))
        longest = max(self._num_tokens.values(), default=0)
        if longest > 1:
            gap_s = max(last_s - first_s, 0.0) / (longest - 1)
            self._metrics.request_time_per_output_token.observe(gap_s)

    def _finish(self, child: CompletionOutput) -> None:
        self._num_open -= 1
        if self._record is not None:
            self._record.finish_reasons[child.finish_reason or "stop"] += 1
        self._metrics.count_finished(child.finish_reason or "stop")
        self._metrics.request_generation_tokens.observe(self._num_tokens.get(child.index, 0))
