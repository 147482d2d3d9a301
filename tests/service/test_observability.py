"""A real server whose traces go to a collector and whose log is JSON, asked by the real ``classify``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span

from tests.service.service_process import ROOT, Running, serving

pytestmark = pytest.mark.service
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """Keeps what is exported to it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.received: list[ResourceSpans] = []

    @property
    def spans(self) -> list[Span]:
        return [span for one in self.received for scope in one.scope_spans for span in scope.spans]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.extend(ExportTraceServiceRequest.FromString(body).resource_spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def collecting() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


def attributes(span: Span) -> dict[str, object]:
    return {one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in span.attributes}


def test_traces_and_json_lines_of_a_real_server(
    tmp_path: Path, photos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        with serving(log, LOG_FORMAT="json", ACCESS_LOG="on", DRAIN_GRACE_S="0") as server:
            server.wait_ready()
            sent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine", "X-Width": "0.25"}
            reply = server.http.post("/v1/classify", content=photos[0], headers=sent)
            assert reply.status_code == 200
            asked = {"Accept": "application/openmetrics-text; version=1.0.0"}
            scraped = server.http.get("/metrics", headers=asked).text
            server.process.terminate()
            assert server.process.wait(30) == 0
    spans = {span.name: span for span in collector.spans}
    assert spans.keys() == {"POST /v1/classify", "decode", "queue", "inference"}
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    request, timing = spans["POST /v1/classify"], reply.json()["timing_ms"]
    assert request.parent_span_id.hex() == PARENT
    for stage in ("decode", "queue", "inference"):
        took_ms = (spans[stage].end_time_unix_nano - spans[stage].start_time_unix_nano) / 1e6
        assert took_ms == pytest.approx(timing[stage], abs=0.002)
        assert spans[stage].parent_span_id == request.span_id
        assert request.start_time_unix_nano <= spans[stage].start_time_unix_nano + 1000
    assert attributes(spans["inference"])["scala.width"] == 0.25
    assert 'request_id="mine",trace_id="' + TRACE in scraped
    service = {one.key: one.value.string_value for one in collector.received[0].resource.attributes}
    assert service["service.name"] == "scala-serve"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"scala.serve", "uvicorn.error", "scala.access"} <= {line["logger"] for line in lines}
    (access,) = [line for line in lines if line["logger"] == "scala.access"]
    assert access.items() >= {"request_id": "mine", "trace_id": TRACE, "status": 200, "width": "0.25"}.items()


def test_the_command_classifies_over_http(server: Running, photos: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(photos[0])
    (tmp_path / "bad.jpg").write_bytes(photos[1][:200])
    command = [sys.executable, "-m", "server", "classify", str(tmp_path), "--url", f"http://127.0.0.1:{server.port}"]
    environ = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        [*command, "--json", "--width", "0.25"], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stderr
    bad, good = json.loads(done.stdout)["results"]
    assert bad["error"]["status"] == 422
    own = server.http.post("/v1/classify?top_k=1", content=photos[0], headers={"X-Width": "0.25"}).json()
    assert (good["width"], good["predictions"][0]["class_id"]) == (0.25, own["predictions"][0]["class_id"])
