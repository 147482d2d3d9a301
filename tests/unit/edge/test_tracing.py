"""The traces that requests leave: spans of the right length, in the caller's trace, and none where none are wanted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanContext, SpanKind, StatusCode

from scala_model.checkpoint import Checkpoint
from server.api_keys import line_for, new_key
from server.spans import Tracer
from tests.unit.edge.application import CLASSIFY, Runner, Site, client, form
from tests.unit.toy import png

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}


class Traces:
    """What was exported, in the order of its end."""

    def __init__(self) -> None:
        self._memory = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._memory))
        self.tracer = Tracer(provider)

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self._memory.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


@pytest.fixture
def traces() -> Traces:
    return Traces()


def ms(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e6


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def place(span: ReadableSpan) -> SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


def trace_id(span: ReadableSpan) -> str:
    return f"{place(span).trace_id:032x}"


def test_a_request_and_the_stages_of_its_image(site: Runner, traces: Traces) -> None:
    """The batch begins 30 ms late, behind one that is pinned to width 0.75, and takes 40 ms at width 1."""

    async def scenario(site: Site) -> None:
        first = asyncio.create_task(site.classify(headers={"X-Width": "0.75"}))
        await asyncio.sleep(0.001)
        reply = await site.classify(headers={"X-Width": "1", "X-Latency-Budget-Ms": "200", "X-Request-Id": "mine"})
        await first
        assert reply.status == 200
        (request,) = [span for span in traces.spans if attributes(span).get("scala.request_id") == "mine"]
        assert (request.name, request.kind, request.parent) == ("POST /v1/classify", SpanKind.SERVER, None)
        assert (
            attributes(request).items()
            >= {
                "http.request.method": "POST",
                "url.scheme": "http",
                "url.path": CLASSIFY,
                "http.route": CLASSIFY,
                "http.response.status_code": 200,
                "network.protocol.version": "1.1",
                "client.address": "127.0.0.1",
                "scala.outcome": "met",
                "scala.budget_ms": 200.0,
            }.items()
        )
        assert ms(request) == pytest.approx(1000 * reply.seconds, abs=0.01)
        children = [span for span in traces.spans if span.parent and span.parent == place(request)]
        assert [child.name for child in children] == ["decode", "queue", "inference"]
        decode, queue, inference = children
        assert ms(decode) + ms(queue) == pytest.approx(29, abs=0.01)
        assert ms(inference) == pytest.approx(40, abs=0.01)
        assert decode.start_time == pytest.approx(request.start_time, abs=1000)
        assert decode.end_time == pytest.approx(queue.start_time, abs=1000)
        assert queue.end_time == pytest.approx(inference.start_time, abs=1000)
        stage = attributes(inference)
        assert (stage["scala.width"], stage["scala.batch_size"], stage["scala.expected_accuracy"]) == (1.0, 1, 0.7)
        assert stage["scala.slack_ms"] == pytest.approx(200 - 29, abs=0.1)
        assert "scala.predicted_ms" in stage

    site(scenario, tracer=traces.tracer)


def test_every_image_of_a_request_has_its_stages(site: Runner, traces: Traces) -> None:
    async def scenario(site: Site) -> None:
        body, headers = form(png(1), b"no image", png(2))
        await site.classify(body, headers)
        assert [len(traces.named(stage)) for stage in ("decode", "queue", "inference")] == [2, 2, 2]

    site(scenario, tracer=traces.tracer)


@pytest.mark.parametrize(("flags", "seen"), [("01", True), ("00", False)])
def test_the_callers_trace_goes_on(site: Runner, traces: Traces, flags: str, seen: bool) -> None:
    async def scenario(site: Site) -> None:
        await site.classify(headers={"traceparent": f"00-{TRACE}-{PARENT}-{flags}", "tracestate": "vendor=1"})
        assert bool(traces.spans) is seen
        if seen:
            request = traces.one("POST /v1/classify")
            assert {trace_id(span) for span in traces.spans} == {TRACE}
            assert request.parent is not None
            assert f"{request.parent.span_id:016x}" == PARENT
            assert place(request).trace_state.to_header() == "vendor=1"

    site(scenario, tracer=traces.tracer)


def test_a_broken_traceparent_starts_a_trace(site: Runner, traces: Traces) -> None:
    async def scenario(site: Site) -> None:
        for broken in ("nonsense", f"00-{TRACE}-{PARENT}", f"00-{'0' * 32}-{PARENT}-01"):
            assert (await site.classify(headers={"traceparent": broken})).status == 200
        requests = traces.named("POST /v1/classify")
        assert [request.parent for request in requests] == [None] * 3
        assert len({trace_id(request) for request in requests}) == 3

    site(scenario, tracer=traces.tracer)


def test_an_expired_request_shows_where_its_time_went(site: Runner, traces: Traces) -> None:
    async def scenario(site: Site) -> None:
        site.engine.seconds = lambda width, images: 0.5
        reply = await site.classify(headers={"X-Latency-Budget-Ms": "100"})
        assert reply.status == 504
        request = traces.one("POST /v1/classify")
        assert attributes(request).items() >= {"scala.outcome": "expired", "error.type": "504"}.items()
        assert request.status.status_code is StatusCode.ERROR
        assert ms(traces.one("queue")) == pytest.approx(100, abs=1)
        assert attributes(traces.one("queue")) == {"scala.dispatched": True}
        assert not traces.named("inference")

    site(scenario, tracer=traces.tracer)


def test_no_key_is_in_a_trace(site: Runner, traces: Traces, tmp_path: Path) -> None:
    key = new_key()
    (tmp_path / "keys").write_text(line_for("alice", key))

    async def scenario(site: Site) -> None:
        for given in (key, f"{key}x"):
            await site.classify(headers={"Authorization": f"Bearer {given}"})
        served, refused = (attributes(span)["http.response.status_code"] for span in traces.named("POST /v1/classify"))
        assert (served, refused) == (200, 403)
        assert key not in "".join(span.to_json() for span in traces.spans)

    site(scenario, tracer=traces.tracer, api_keys_file=tmp_path / "keys")


def test_what_never_became_a_job_is_a_request_alone(site: Runner, traces: Traces) -> None:
    async def scenario(site: Site) -> None:
        await site.classify(b"no image")
        await site.classify(receive=client((0.0, b"\x89PNG"), leaves_after=0.01), headers={"Content-Length": "x"})
        await site.ask("GET", "/nowhere?a=1")
        await site.ask("BREW", "/v1/model", headers={"User-Agent": "pot"})
        broken, left, nowhere, brew = traces.spans
        assert (broken.name, attributes(broken)["http.response.status_code"]) == ("POST /v1/classify", 415)
        assert broken.status.status_code is StatusCode.UNSET, "a client's fault is no error of the server"
        assert left.name == "POST /v1/classify"
        assert (nowhere.name, attributes(nowhere)["url.query"]) == ("GET", "a=1")
        assert "http.route" not in attributes(nowhere)
        assert brew.name.startswith("HTTP")
        assert (
            attributes(brew).items()
            >= {
                "http.request.method": "_OTHER",
                "http.request.method_original": "BREW",
                "user_agent.original": "pot",
            }.items()
        )

    site(scenario, tracer=traces.tracer)


def test_probes_and_scrapes_leave_no_trace(site: Runner, traces: Traces) -> None:
    async def scenario(site: Site) -> None:
        for path in ("/livez", "/readyz", "/metrics"):
            await site.ask("GET", path)
        assert not traces.spans

    site(scenario, tracer=traces.tracer)


def test_buckets_lead_to_a_trace_that_there_is(site: Runner, traces: Traces) -> None:
    async def scenario(site: Site) -> None:
        sampled = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "r1"}
        await site.classify(headers=sampled)
        text = (await site.ask("GET", "/metrics", headers=OPENMETRICS)).body.decode()
        assert f'# {{request_id="r1",trace_id="{TRACE}"}} 0.0' in text
        await site.classify(headers={"traceparent": f"00-{TRACE}-{PARENT}-00", "X-Request-Id": "r2"})
        text = (await site.ask("GET", "/metrics", headers=OPENMETRICS)).body.decode()
        assert '# {request_id="r2"} 0.0' in text
        await site.classify(headers=sampled | {"X-Request-Id": "x" * 128})
        text = (await site.ask("GET", "/metrics", headers=OPENMETRICS)).body.decode()
        assert f'# {{trace_id="{TRACE}"}} 0.0' in text, "an id that is too long for an exemplar is left out"

    site(scenario, tracer=traces.tracer)


def test_what_is_not_sampled_has_no_stages(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        assert (await site.classify()).status == 200

    memory, provider = InMemorySpanExporter(), TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    site(scenario, tracer=Tracer(provider))
    assert not memory.get_finished_spans()


def test_leaving_exports_what_is_left(checkpoint: Checkpoint) -> None:
    memory, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(memory, schedule_delay_millis=60_000))

    async def scenario(site: Site) -> None:
        await site.classify()
        assert not memory.get_finished_spans()

    Runner(checkpoint)(scenario, tracer=Tracer(provider))
    assert len(memory.get_finished_spans()) == 4


def test_a_collector_that_is_gone_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.spans.FLUSH_S", 0.02)
    back = threading.Event()

    class Stuck(TracerProvider):
        def shutdown(self) -> None:
            back.wait(10)

    started = time.monotonic()
    Tracer(Stuck(shutdown_on_exit=False)).close()
    assert time.monotonic() - started < 1
    back.set()
