"""Liveness, readiness and metrics: answered by the event loop alone, never through the inference queue."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from server.routes.documentation import LIVEZ, METRICS, READYZ
from server.services import Services

router = APIRouter()


@router.get("/livez", response_class=PlainTextResponse, **LIVEZ)
async def livez() -> str:
    """200 while the event loop turns."""
    return "ok"


@router.get("/readyz", response_class=PlainTextResponse, **READYZ)
async def readyz(request: Request) -> Response:
    """200 once the narrowest and the widest width are warmed; 503 while starting, draining or failed."""
    services: Services = request.scope["state"]["services"]
    ready = services.lifecycle.ready
    return PlainTextResponse("ready" if ready else services.lifecycle.why_not_ready(), 200 if ready else 503)


@router.get("/metrics", response_class=PlainTextResponse, **METRICS)
async def metrics(request: Request) -> Response:
    """Prometheus text format, or OpenMetrics, which has exemplars, for a scraper that asks for it."""
    services: Services = request.scope["state"]["services"]
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(services.metrics.registry), headers={"Content-Type": content_type})
