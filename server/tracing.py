"""Whether requests leave traces: the standard ``OTEL_*`` variables say so, and the ``tracing`` extra makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from server.settings import SettingsError

if TYPE_CHECKING:
    from server.spans import Tracer

_ASKING = ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def tracer_of(environ: Mapping[str, str]) -> Tracer | None:
    """What makes the traces that the environment asks for, None when it asks for none.

    They are asked for by naming an exporter or an endpoint; everything else (headers, sampler, service name, batches)
    is read by OpenTelemetry itself. Raises SettingsError for what is not supported, or not installed.
    """
    asking = next((name for name in _ASKING if environ.get(name)), None)
    exporter = environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    disabled = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if asking is None or exporter == "none" or disabled:
        return None
    if exporter not in ("otlp", "console"):
        raise SettingsError(
            f"environment OTEL_TRACES_EXPORTER is {exporter!r:.200}; it must be 'otlp', 'console' or 'none'"
        )
    protocol = next((name for name in _PROTOCOLS if environ.get(name)), None)
    if protocol is not None and environ[protocol] != "http/protobuf":
        raise SettingsError(f"environment {protocol} is {environ[protocol]!r:.200}; it must be 'http/protobuf'")
    try:
        from server.spans import Tracer
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"environment {asking} asks for traces, but {error.name} is missing: pip install 'scala-serve[tracing]', "
            f"or set OTEL_TRACES_EXPORTER=none"
        ) from None
    return Tracer.exporting(exporter)
