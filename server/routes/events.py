"""``GET /v1/events``: the server's live numbers as server-sent events."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.errors import Unavailable
from server.pulse import Pulse
from server.routes.documentation import EVENTS
from server.services import Services

MAX_LISTENERS = 32
router = APIRouter()


class EventStream(StreamingResponse):
    """Counts as a listener until the client leaves or the server does."""

    media_type = "text/event-stream"

    def __init__(self, pulse: Pulse) -> None:
        # Without the second header nginx would keep events back until it has some kilobytes of them.
        super().__init__(pulse.listen(), headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._pulse = pulse
        pulse.listeners += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._pulse.listeners -= 1


@router.get("/v1/events", response_class=Response, **EVENTS)
async def events(request: Request) -> EventStream:
    """One event a second, beginning with those of the last two minutes; each event's `data` is a `Tick` in JSON."""
    services: Services = request.scope["state"]["services"]
    if services.pulse.over:
        raise Unavailable(f"There are no more events: {services.lifecycle.why_not_ready()}; try again.")
    if services.pulse.listeners >= MAX_LISTENERS:
        raise Unavailable(f"{MAX_LISTENERS} clients listen to events already, the most there may be: close one first.")
    return EventStream(services.pulse)
