"""The outermost layer, pure ASGI: starts each request's clock, names it, counts it, and lets no exception out.

Pure ASGI because a client's disconnect does not reach handlers through Starlette's ``BaseHTTPMiddleware``.
"""

from __future__ import annotations

import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import errors
from server.lifecycle import Lifecycle
from server.metrics import Metrics
from server.routes.problem import problem_response

MAX_REQUEST_ID = 128
OUTCOMES: dict[type[errors.RequestError], str] = {
    errors.Shed: "shed",
    errors.Impossible: "impossible",
    errors.Expired: "expired",
    errors.Gone: "cancelled",
}
log = logging.getLogger("scala.http")


class Edge:
    """``scope["state"]`` of every request carries ``arrival`` (monotonic seconds), ``request_id`` and its outcome."""

    def __init__(self, app: ASGIApp, *, lifecycle: Lifecycle, metrics: Metrics) -> None:
        self._app, self._lifecycle, self._metrics = app, lifecycle, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrival = time.monotonic()
        state = scope.setdefault("state", {})
        state |= {"arrival": arrival, "request_id": _request_id(Headers(scope=scope)), "width": ""}
        exchange = _Exchange(send, state["request_id"], self._lifecycle)
        self._lifecycle.in_flight += 1
        try:
            await self._app(scope, receive, exchange.send)
        except Exception:
            log.exception("request %s failed", state["request_id"])
            if exchange.status == 0:
                await problem_response(Exception(), state["request_id"])(scope, receive, exchange.send)
        finally:
            self._lifecycle.in_flight -= 1
            self._record(scope, exchange.status, time.monotonic() - arrival)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route, state = getattr(scope.get("route"), "path", "none"), scope["state"]
        self._metrics.requests.labels(route, str(status)).inc()
        if outcome := state.get("outcome"):
            self._metrics.budget.labels(outcome).inc()
            self._metrics.request_duration.labels(state["width"], outcome).observe(seconds)


def outcome_of(error: Exception) -> str | None:
    """What an error means for the request's budget; None where the request was not a well-formed one."""
    return OUTCOMES.get(type(error)) if isinstance(error, errors.RequestError) else None  # type: ignore[arg-type]


class _Exchange:
    """One response on its way out: adds the request id, remembers the status, closes connections while leaving."""

    def __init__(self, send: Send, request_id: str, lifecycle: Lifecycle) -> None:
        self._send, self._request_id, self._lifecycle = send, request_id, lifecycle
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self._request_id
            if self._lifecycle.refusing:
                headers["Connection"] = "close"
        await self._send(message)


def _request_id(headers: Headers) -> str:
    """The caller's id, if it is short and printable, else a new one."""
    given = headers.get("x-request-id", "")
    return given if 0 < len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable() else uuid.uuid4().hex
