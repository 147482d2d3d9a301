"""The outermost layer, pure ASGI: starts each request's clock, names it, counts it, and lets no exception out.

Pure ASGI because a client's disconnect does not reach handlers through Starlette's ``BaseHTTPMiddleware``. The hot
endpoints are called from here: the framework's own layers took 45 % of the event loop's time while most requests were
refused, and they stay in charge of everything else, their documentation included.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import errors
from server.api_keys import Gate, is_for_callers
from server.lifecycle import Lifecycle
from server.log import PROBES, http_log, log_access, log_engine_failures
from server.routes.problem import error_response
from server.services import Services

MAX_REQUEST_ID = 128
MAX_QUERY_BYTES, MAX_QUERY_PARTS = 2048, 32  # taking 32 KB of '&' apart held the event loop for 0.1 s
LINGER_S = 5.0  # in which a client may go on to upload what is not read any more
OUTCOMES: dict[type[errors.RequestError], str] = {
    errors.Shed: "shed",
    errors.Impossible: "impossible",
    errors.Expired: "expired",
    errors.EngineFailed: "failed",
    errors.Unavailable: "failed",
    errors.Gone: "cancelled",
}
Endpoint = Callable[[Request], Awaitable[Response]]
Hot = Mapping[tuple[str, str], tuple[str, Endpoint]]  # by method and path: the route, as metrics call it


class Edge:
    """``scope["state"]`` of every request carries ``services``, ``arrival`` (monotonic seconds) and ``request_id``.

    ``around`` is put around all that answers.
    """

    def __init__(
        self,
        app: ASGIApp,
        services: Services,
        hot: Hot,
        gate: Gate | None = None,
        around: Callable[[ASGIApp], ASGIApp] | None = None,
    ) -> None:
        self._app, self._services, self._hot, self._gate = app, services, hot, gate
        self._lifecycle, self._metrics, self._tracer = services.lifecycle, services.metrics, services.tracer
        self._logs_access = services.settings.access_log == "on"
        self._admin = services.settings.admin
        self._around = around or (lambda app: app)
        self._answering = self._around(self._answer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrival = time.monotonic()
        request_id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {}).update(services=self._services, arrival=arrival, request_id=request_id, width="")
        exchange = _Exchange(scope, receive, send, self._lifecycle)
        self._lifecycle.in_flight += 1
        try:
            await self._answering(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:  # at the server's end
            if exchange.status != 0:
                raise
            farewell = await answer_error(Request(scope, exchange.receive), self._lifecycle.farewell())
            await self._around(farewell)(scope, exchange.receive, exchange.send)
        except Exception:
            http_log.exception("a request failed", extra={"request_id": request_id})
            if "terms" in scope["state"]:
                scope["state"]["outcome"] = "failed"
            if exchange.status == 0:
                failure = self._around(error_response(Exception(), scope))
                await failure(scope, exchange.receive, exchange.send)
        finally:
            self._lifecycle.in_flight -= 1
            exchange.settle()
            self._record(scope, exchange, (exchange.answered_at or time.monotonic()) - arrival)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        _, endpoint = self._hot.get((scope["method"], scope["path"]), (None, None))
        if (refusal := self._refusal(scope)) is not None:
            response = await answer_error(Request(scope, receive), refusal)
            await response(scope, receive, send)
        elif endpoint is None:
            await self._app(scope, receive, send)
        else:
            response = await _respond(endpoint, Request(scope, receive))
            await response(scope, receive, send)

    def _refusal(self, scope: Scope) -> Exception | None:
        """Why nobody looks at a request any further: its query is too long, its key, or nothing of the kind is at the
        address it came to."""
        query: bytes = scope["query_string"]
        if len(query) > MAX_QUERY_BYTES or query.count(b"&") >= MAX_QUERY_PARTS:
            return errors.BadRequest(
                f"The query has more than {MAX_QUERY_BYTES} bytes or {MAX_QUERY_PARTS} parameters: send fewer or "
                "shorter ones."
            )
        if self._gate is not None and (refusal := self._gate.refusal(scope)) is not None:
            return refusal
        if self._admin is None or scope["server"][1] == self._admin[1] or is_for_callers(scope["path"]):
            return None
        return HTTPException(404)

    def _record(self, scope: Scope, exchange: _Exchange, seconds: float) -> None:
        status = exchange.status
        route, state = getattr(scope.get("route"), "path", None) or "none", scope["state"]
        route, _ = self._hot.get((scope["method"], scope["path"]), (route, None))
        self._metrics.requests.labels(route, str(status)).inc()
        trace_id = ""
        if self._tracer is not None and scope["path"] not in PROBES:
            trace_id = self._tracer.request(scope, None if route == "none" else route, status)
        if self._logs_access and scope["path"] not in PROBES:
            log_access(scope, status, seconds, trace_id)
        if "ran_until" in state and exchange.began_at:
            self._services.monitor.respond.observe(exchange.began_at - state["ran_until"], time.monotonic())
        if (outcome := state.get("outcome")) and scope["method"] == "POST":  # a quote is no request of its own
            self._metrics.budget.labels(outcome).inc()
            exemplar = self._metrics.exemplar(state["request_id"], trace_id)
            self._metrics.request_duration.labels(state["width"], outcome).observe(seconds, exemplar)
            if outcome == "shed" and not state.get("jobs"):  # nor given up in the queue
                self._metrics.stage_duration.labels("refusal").observe(seconds)
            if "terms" in state and outcome != "failed":  # which says nothing about load
                self._services.settled(state["terms"], state.get("jobs"), outcome)


async def _respond(endpoint: Endpoint, request: Request) -> Response:
    try:
        return await endpoint(request)
    except (errors.RequestError, MemoryError) as error:
        return await answer_error(request, error)


async def answer_error(request: Request, error: Exception) -> Response:
    """The answer to an expected error, noting what it means for the request's budget. Also the framework's handler."""
    if isinstance(error, RequestValidationError):
        error = errors.BadRequest("; ".join(str(entry["msg"]) for entry in error.errors()))
    if isinstance(error, MemoryError):
        error = errors.no_memory()
    state = request.scope["state"]
    log_engine_failures([error], state["request_id"])
    if outcome := outcome_of(error):
        state["outcome"] = outcome
    return error_response(error, request.scope)


def outcome_of(error: Exception) -> str | None:
    """What an error means for the request's budget; None where the request was not a well-formed one."""
    return OUTCOMES.get(type(error)) if isinstance(error, errors.RequestError) else None


class _Exchange:
    """One response on its way out: adds what all have, remembers the status, closes connections while leaving.

    A connection that is closed while its client uploads is reset, and the client may never see the answer: where that
    one comes before the body's end, the close waits for the rest. ``answered_at`` is then the instant of the answer.
    ``began_at`` is when it was there to be sent: from then on its client may keep it waiting.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, lifecycle: Lifecycle) -> None:
        self._scope, self._receive, self._send, self._lifecycle = scope, receive, send, lifecycle
        self._uploading = True  # as far as we have read
        self.status, self.began_at, self.answered_at = 0, 0.0, 0.0
        task = asyncio.current_task()
        assert task is not None, "every request is a task"
        self._task = task
        lifecycle.unanswered.add(task)

    def settle(self) -> None:
        """It has its answer, or will have none."""
        self._lifecycle.unanswered.discard(self._task)

    async def receive(self) -> Message:
        message = await self._receive()
        self._uploading = message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.settle()
            self.status, self.began_at = message["status"], time.monotonic()
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self._scope["state"]["request_id"]
            headers["X-Content-Type-Options"] = "nosniff"  # nobody shall take an answer for a page
            if self._is_leaving():
                headers["Connection"] = "close"
        elif self._uploading and not message.get("more_body", False) and self._closes():
            await self._send({**message, "more_body": True})
            self.answered_at = time.monotonic()
            await self._drop_the_rest()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    def _is_leaving(self) -> bool:
        return self._lifecycle.draining or self._lifecycle.failed is not None

    def _closes(self) -> bool:
        """Whether the connection ends with this answer, by our wish or the client's."""
        asked = ",".join(Headers(scope=self._scope).getlist("connection")).lower()
        return self._is_leaving() or self._scope["http_version"] == "1.0" or "close" in asked

    async def _drop_the_rest(self) -> None:
        with suppress(TimeoutError, asyncio.CancelledError):  # the server's end is the upload's, too
            async with asyncio.timeout(LINGER_S):
                while self._uploading:
                    await self.receive()


def _request_id(headers: Headers) -> str:
    """The caller's id, if it is short and printable, else a new one."""
    given = headers.get("x-request-id", "")
    return given if 0 < len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable() else uuid.uuid4().hex
