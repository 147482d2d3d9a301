"""When requests are traced: off unless the environment asks, and loud where what it asks for cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider

from server.settings import SettingsError
from server.spans import Tracer
from server.tracing import tracer_of

ROOT = Path(__file__).parents[2]
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


@pytest.fixture
def _no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tracer, "exporting", classmethod(lambda cls, exporter: exporter))


def problem(environ: dict[str, str]) -> str:
    with pytest.raises(SettingsError) as refusal:
        tracer_of(environ)
    return str(refusal.value)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_SERVICE_NAME": "x", "OTEL_TRACES_SAMPLER": "always_on", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_TRACES_EXPORTER": "none", **ENDPOINT},
        {"OTEL_SDK_DISABLED": "true", **ENDPOINT},
    ],
)
def test_nothing_is_traced_unless_asked_for(environ: dict[str, str]) -> None:
    assert tracer_of(environ) is None


@pytest.mark.usefixtures("_no_export")
@pytest.mark.parametrize(
    ("environ", "exporter"),
    [
        (ENDPOINT, "otlp"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x/v1/traces"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "console", **ENDPOINT}, "console"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_SDK_DISABLED": "false", **ENDPOINT}, "otlp"),
    ],
)
def test_the_standard_variables_ask(environ: dict[str, str], exporter: str) -> None:
    assert tracer_of(environ) == exporter  # type: ignore[comparison-overlap]


def test_what_cannot_be_done_is_refused() -> None:
    assert problem({"OTEL_TRACES_EXPORTER": "zipkin"}) == (
        "environment OTEL_TRACES_EXPORTER is 'zipkin'; it must be 'otlp', 'console' or 'none'"
    )
    assert problem({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", **ENDPOINT}) == (
        "environment OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'; it must be 'http/protobuf'"
    )


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "server.spans")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    text = problem(ENDPOINT)
    assert text.startswith("environment OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, but opentelemetry.sdk.trace ")
    assert "pip install 'scala-serve[tracing]'" in text
    assert tracer_of({}) is None


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, "scala-serve"),
        ({"OTEL_SERVICE_NAME": "photos"}, "photos"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=shop,zone=eu"}, "shop"),
    ],
)
def test_the_service_has_a_name(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], name: str) -> None:
    for variable in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    made: list[TracerProvider] = []
    monkeypatch.setattr(Tracer, "__init__", lambda self, provider: made.append(provider))
    Tracer.exporting("console")
    (provider,) = made
    provider.shutdown()
    attributes = provider.resource.attributes
    assert attributes["service.name"] == name
    assert attributes.get("zone") == ("eu" if "zone" in str(environ) else None)
    assert attributes["telemetry.sdk.name"] == "opentelemetry"


def test_a_server_that_traces_nothing_loads_nothing_of_it() -> None:
    program = (
        "import sys, server.app, server.lifecycle; from server.tracing import tracer_of; tracer_of({}); "
        "assert not [name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'server.spans'))]"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environ, check=True, timeout=60)
