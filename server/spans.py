"""The spans of a request, made after its answer from the instants that were taken anyway.

Nothing of OpenTelemetry runs while a request does: no context is carried along, and a slow collector delays nobody.
Names and attributes follow OpenTelemetry's semantic conventions for HTTP servers (stable since 1.23); what they do not
know is called ``scala.*``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Self

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from server.types import Answer, Job

if TYPE_CHECKING:
    from server.services import Services

FLUSH_S = 1.0  # that the last spans may take when the process leaves
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
Value = str | int | float


class Tracer:
    """Makes spans and hands them to ``provider``, whose own thread exports them."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("scala-serve", version("scala-serve"))
        self._w3c = TraceContextTextMapPropagator()

    @classmethod
    def exporting(cls, exporter: str) -> Self:
        """To ``otlp``, by HTTP, or ``console``, which is standard output; the rest is in ``OTEL_*`` variables."""
        ours = {"service.name": "scala-serve", "service.version": version("scala-serve")}
        resource = Resource.create({**ours, **OTELResourceDetector().detect().attributes})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        to: SpanExporter = OTLPSpanExporter() if exporter == "otlp" else ConsoleSpanExporter()
        provider.add_span_processor(BatchSpanProcessor(to))
        return cls(provider)

    def request(self, scope: Scope, route: str | None, status: int) -> str:
        """A request was answered just now. Returns the id of its trace, "" when it is not sampled.

        ``scope["state"]`` holds its arrival and, once its body was read, the jobs of its images.
        """
        state, ended = scope["state"], time.monotonic()
        epoch_ns = time.time_ns() - int(1e9 * ended)  # of the monotonic clock
        method = scope["method"] if scope["method"] in METHODS else "HTTP"
        span = self._tracer.start_span(
            f"{method} {route}" if route else method,
            self._w3c.extract(Headers(scope=scope), Context()),
            SpanKind.SERVER,
            dict(_attributes(scope, route, status)),
            start_time=epoch_ns + int(1e9 * state["arrival"]),
        )
        if not span.is_recording():
            return ""
        if status >= 500:
            span.set_status(StatusCode.ERROR)
            span.set_attribute("error.type", str(status))
        for job in state.get("jobs", ()):
            self._image(job, span, ended, epoch_ns, state["services"])
        span.end(epoch_ns + int(1e9 * ended))
        return f"{span.get_span_context().trace_id:032x}"

    def close(self) -> None:
        """Export what is left, in ``FLUSH_S`` at most: a collector that is gone must not keep the process."""
        flush = threading.Thread(target=self._provider.shutdown, daemon=True)
        flush.start()
        flush.join(FLUSH_S)

    def _image(self, job: Job, request: Span, ended: float, epoch_ns: int, services: Services) -> None:
        context = set_span_in_context(request, Context())

        def add(name: str, start: float, end: float, attributes: dict[str, Value] | None = None) -> None:
            span = self._tracer.start_span(name, context, attributes=attributes, start_time=epoch_ns + int(1e9 * start))
            span.end(epoch_ns + int(1e9 * end))

        add("decode", job.queued_at - job.decode_s, job.queued_at)
        answer = _answer(job)
        if answer is None:  # refused, expired or left: it waited to the end, or the batch that ran was of no use to it
            add("queue", job.queued_at, ended, {"scala.dispatched": job.dispatched})
            return
        ran_from = answer.ran_until - answer.inference_s
        add("queue", job.queued_at, ran_from)
        accuracy = services.measured_accuracy[answer.width]
        inference: dict[str, Value] = {
            "scala.width": float(answer.width),
            "scala.batch_size": answer.batch_size,
            "scala.slack_ms": _ms(job.terms.order_by - ran_from),
            "scala.predicted_ms": _ms(answer.predicted_s),
        }
        add(
            "inference",
            ran_from,
            answer.ran_until,
            inference if accuracy is None else {**inference, "scala.expected_accuracy": accuracy},
        )


def _attributes(scope: Scope, route: str | None, status: int) -> Iterator[tuple[str, Value]]:
    state, headers = scope["state"], Headers(scope=scope)
    yield "http.request.method", scope["method"] if scope["method"] in METHODS else "_OTHER"
    if scope["method"] not in METHODS:
        yield "http.request.method_original", scope["method"]
    yield "url.scheme", scope["scheme"]
    yield "url.path", scope["path"]
    if scope["query_string"]:
        yield "url.query", scope["query_string"].decode("latin-1")
    if route:
        yield "http.route", route
    yield "http.response.status_code", status
    yield "network.protocol.version", scope["http_version"]
    if scope.get("client"):
        yield "client.address", scope["client"][0]
    if "user-agent" in headers:
        yield "user_agent.original", headers["user-agent"]
    yield "scala.request_id", state["request_id"]
    if state.get("outcome"):
        yield "scala.outcome", state["outcome"]
    if "terms" in state:
        yield "scala.budget_ms", _ms(state["terms"].order_by - state["terms"].arrival)


def _answer(job: Job) -> Answer | None:
    settled = job.answer.done() and not job.answer.cancelled() and job.answer.exception() is None
    return job.answer.result() if settled else None


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
