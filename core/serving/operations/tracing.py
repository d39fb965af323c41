"""OpenTelemetry: a span for each request, in the trace that the client's headers name."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from quire.core.errors import ConfigError
from quire.core.outputs import RequestMetrics
from quire.core.serving.operations.record import RequestRecord, path_of, record_of

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer, TracerProvider

_NANOSECONDS = 1e9


def install_tracing(app: FastAPI, endpoint: str | None) -> None:
    """Sends the spans of `app` to a collector; does nothing without one.

    Raises: ConfigError if OpenTelemetry is not installed.
    """
    if endpoint is not None:
        app.add_middleware(TracingMiddleware, provider=make_provider(endpoint))


def make_provider(endpoint: str) -> TracerProvider:
    """Makes spans and sends them in batches, off the event loop. Raises: ConfigError."""
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.sdk") is None:
        raise ConfigError('traces need OpenTelemetry; run: pip install "quire[tracing]"')
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider as SdkProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = SdkProvider(resource=Resource.create({"service.name": "quire"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class TracingMiddleware:
    """One span a POST request, with children for its time in the queue, in prefill and in decode.

    The names of attributes are those of OpenTelemetry's conventions for generative models.
    Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
    """

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._app = app
        self._tracer: Tracer = provider.get_tracer("quire.serving")
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        record = record_of(scope)
        if scope["type"] != "http" or scope["method"] != "POST" or record is None:
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind

        parent = self._propagator.extract(dict(Headers(scope=scope)))
        path = path_of(scope)
        with self._tracer.start_as_current_span(
            f"POST {path}", context=parent, kind=SpanKind.SERVER
        ) as span:
            try:
                await self._app(scope, receive, send)
            finally:
                span.set_attributes(_attributes(record, path))
                self._add_stages(span, record)

    def _add_stages(self, parent: Span, record: RequestRecord) -> None:
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(parent)
        offset_s = time.time() - time.monotonic()
        for times in record.timings:
            for name, begin_s, end_s in _stages(times):
                span = self._tracer.start_span(
                    name, context=context, start_time=int((begin_s + offset_s) * _NANOSECONDS)
                )
                span.end(int((end_s + offset_s) * _NANOSECONDS))


def _stages(times: RequestMetrics) -> list[tuple[str, float, float]]:
    """Name, begin and end of what the engine did, as far as it came."""
    marks = [
        ("queue", times.arrival_time_s, times.first_scheduled_time_s),
        ("prefill", times.first_scheduled_time_s, times.first_token_time_s),
        ("decode", times.first_token_time_s, times.last_token_time_s),
    ]
    return [
        (name, begin_s, max(begin_s, end_s))
        for name, begin_s, end_s in marks
        if begin_s is not None and end_s is not None
    ]


def _attributes(record: RequestRecord, path: str) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "http.request.method": "POST",
        "http.response.status_code": record.status,
        "url.path": path,
        "gen_ai.request.id": record.request_id,
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.cached_tokens": record.num_cached_tokens,
        "gen_ai.usage.output_tokens": record.num_output_tokens,
        "gen_ai.response.finish_reasons": sorted(record.finish_reasons),
        "gen_ai.latency.e2e": time.monotonic() - record.arrival_s,
    }
    if record.time_to_first_token_s is not None:
        attributes["gen_ai.latency.time_to_first_token"] = record.time_to_first_token_s
    return attributes
