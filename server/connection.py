"""What a stranger may do with a connection: uvicorn's HTTP, with a limit on all that it would do or keep for a client.

uvicorn itself waits for a head, or for an answer to be taken, as long as a client likes; it keeps heads of any size
and requests sent in advance without end. Here it is at any time either the server's turn, from a request's last byte
to its answer, or the client's, since an instant that is looked at once a second, without a timer a request. So is an
answer that is not taken. Of more connections than may be, those go on which it has been the client's turn for longest,
for what the connection is worth: an idle one is waited for four times as long as one that never said anything, and a
request that comes in four times as long as that. So who holds many connections shuts nobody out, whether he says
nothing, asks for a trifle on each or begins to upload: where 200 new ones a second push through 1,000, each lives for
5 s, and an idle one among uploads for 1.25 s.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import random
import resource
import socket
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from server.errors import BadRequest, HeadTooLarge, RequestError, TooSlow, Unavailable, no_memory
from server.routes.problem import error_response

# Of names and values, those behind a chunked body included; what comes in one read is taken apart in any case, 256 KiB
# at most.
MAX_HEAD_BYTES = 32 * 1024
MAX_HEADERS = 100
# Each piece of a chunked body takes the event loop about a microsecond, however small: so many of any size, and one
# more for each so many bytes.
FREE_CHUNKS, FEW_BYTES = 4096, 64
MAX_AHEAD = 8  # requests sent before the answer to an earlier one
MAX_AHEAD_BYTES = 64 * 1024  # of their bodies, which nobody counts yet
# A Service's balancer chooses a replica for a connection, not for a request: callers that keep theirs open would never
# meet one that was started since. So each ends with an answer after a while, not all at once.
MIN_AGE_S, MAX_AGE_S = 30.0, 90.0
SEND_BYTES = 128 * 1024  # that the system takes off our hands for a client, doubled on Linux; of itself it took 4 MB
LINGER_S = 2.0  # for who is still sending to read why he is refused: closing at once would tear the answer down
FAREWELL_S = 0.1  # for an answer to leave
_SHARE_TO_CLOSE = 16  # of the connections at a time, since finding the oldest goes through all of them
_AT_ONCE = 64  # to be closed in one turn of the event loop: each may take 50 us, most of it for telling why
_OTHER_FILES = 256  # that the process may want to open

log = logging.getLogger("scala.serve")


@dataclass(frozen=True)
class Doorkeeper:
    """Limits for all connections of a server. ``closed`` counts why one was: malformed, slow or full."""

    max_connections: int
    timeout_s: float
    closed: Callable[[str], object]

    def make_room(self, connections: Collection[Connection], newest: Connection) -> None:
        """Close some connections of those whose client keeps the server waiting; the newest if there is no other."""
        num_closed = min(_AT_ONCE, max(1, len(connections) // _SHARE_TO_CLOSE))
        now = time.monotonic()
        waiting = {each: each.waits_since for each in connections if each is not newest}
        by_age = {each: (now - since) / each.worth for each, since in waiting.items() if since is not None}
        for each in heapq.nlargest(num_closed, by_age, key=by_age.__getitem__) or [newest]:
            _attempt(each, each.give_way)

    def look(self, connections: Collection[Connection], now: float) -> None:
        """Close the connections whose client takes too long, in as many turns of the event loop as that takes."""
        self._look_at_some(iter(tuple(connections)), now)

    def _look_at_some(self, rest: Iterator[Connection], now: float) -> None:
        some = tuple(islice(rest, _AT_ONCE))
        for each in some:
            _attempt(each, partial(each.look, now))
        if some:
            asyncio.get_running_loop().call_soon(self._look_at_some, rest, now)


def _attempt(connection: Connection, action: Callable[[], None]) -> None:
    """One connection's fault stays with it: neither the newcomer, nor the server's own clock, shall end by it."""
    try:
        action()
    except Exception:
        log.exception("a connection could not be looked after")
        connection.transport.abort()


class Connection(HttpToolsProtocol):
    """One client's connection. ``since``: from when on it has been the client's turn."""

    connections: set[Connection]  # type: ignore[assignment]

    def __init__(self, keeper: Doorkeeper, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._keeper = keeper
        self.since = time.monotonic()
        self._last_request = self.since + random.uniform(MIN_AGE_S, MAX_AGE_S)
        self.was_answered = False
        self._current: RequestResponseCycle | None = None  # the request that is being answered, or was last
        self._receiving = self._in_head = False
        self._head_bytes = self._num_headers = self._body_bytes = self._num_chunks = 0
        self._untold_bytes = 0  # since the parser last told something of a request: it keeps a name until its end
        self._fault: RequestError | None = None  # what a callback found, which the parser hides
        self._refused = False
        self._unsent_since: float | None = None

    @property
    def is_clients_turn(self) -> bool:
        """Whether nothing can be done before the client sends more, or leaves."""
        current = self._current
        return current is None or current.response_complete or current.more_body

    @property
    def waits_since(self) -> float | None:
        """From when on the client has kept the server waiting: for what it sends, or to take what is sent to it."""
        if self.is_clients_turn:
            return self.since
        return self._unsent_since if self.transport.get_write_buffer_size() else None

    @property
    def worth(self) -> float:
        """How much longer it is waited for, while others want its place, than a connection that never said anything."""
        if self._owes_answer:
            return 16.0
        return 4.0 if self.was_answered else 1.0

    # -- by the doorkeeper

    def give_way(self) -> None:
        """Close, for another connection to be had."""
        self.connections.discard(self)  # now: who comes next would look for room once more
        self._keeper.closed("full")
        if self._refused or self.transport.is_closing():  # and told all that it will be
            self.transport.abort()
            return
        if self._owes_answer or not self.was_answered:
            most = self._keeper.max_connections
            self._answer(
                Unavailable(
                    f"The server has as many connections as it may (SCALA_MAX_CONNECTIONS is {most}), and this one has "
                    "kept it waiting for longest: try again."
                )
            )
        if self.transport.get_write_buffer_size() and self.scheme == "http":
            self.transport.abort()
            return
        self.transport.close()
        if self.scheme == "https":  # its client has to agree to the end, and may keep the file open by its silence
            self.loop.call_later(FAREWELL_S, self.transport.abort)

    def look(self, now: float) -> None:
        """Close if the client takes too long to take what was sent, or to send."""
        if not self.transport.get_write_buffer_size():
            self._unsent_since = None
        elif self._unsent_since is None:
            self._unsent_since = now
        elif now - self._unsent_since > self._keeper.timeout_s:
            self._keeper.closed("slow")
            self.transport.abort()
            return
        if self.is_clients_turn and not self.transport.is_closing() and now - self.since > self._patience_s():
            self._lose_patience()

    def _patience_s(self) -> float:
        if self._refused:
            return LINGER_S
        idle = self.was_answered and not self._receiving
        return self.timeout_keep_alive if idle else self._keeper.timeout_s

    def _lose_patience(self) -> None:
        if self._refused:
            self.transport.abort()
        elif self._owes_answer:
            self._refuse(
                TooSlow(
                    f"The request has not come in within {self._keeper.timeout_s:g} s (SCALA_CLIENT_TIMEOUT_S): "
                    "send it faster, or less."
                ),
                "slow",
            )
        else:
            if self._receiving or not self.was_answered:
                self._keeper.closed("slow")
            self.transport.close()

    @property
    def _owes_answer(self) -> bool:
        """Whether a request is coming in, and not only the rest of a body that was refused already."""
        return self._in_head or (self._receiving and not self.cycle.response_complete)

    # -- by the event loop

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if (own := transport.get_extra_info("socket")) is not None:
            with suppress(OSError):  # it was reset already, on some systems
                own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        if len(self.connections) > self._keeper.max_connections:
            self._keeper.make_room(self.connections, self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._current is not None and not self._current.response_complete:  # uvicorn tells the newest request only
            _tell_gone(self._current)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        told = self._told
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._refuse(self._fault or _fault_of(error), "malformed")
        else:
            self._untold_bytes = self._untold_bytes + len(data) if self._receiving and self._told == told else 0
            if self._head_bytes + self._untold_bytes > MAX_HEAD_BYTES:
                self._refuse(_too_large_head(), "malformed")

    @property
    def _told(self) -> tuple[bool, int, int]:
        """What changes with all that the parser tells of a request before its end."""
        return self._in_head, self._head_bytes, self._body_bytes

    def _go_on_without_upgrade(self, rest: bytes) -> None:
        """There is nothing to upgrade to, and a client that offers it goes on as if it had not (RFC 9110, section 7.8);
        the parser does not, and would lose the body."""
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":
            self._refuse(BadRequest("The method is CONNECT: this server is no proxy."), "malformed")
            return
        lines = [b"%s %s HTTP/%s" % (method, self.url, version.encode())]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.data_received(b"\r\n".join([*lines, b"", b""]) + rest)

    # -- by the parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._receiving = self._in_head = True
        self._head_bytes = self._num_headers = self._body_bytes = self._num_chunks = 0
        if self.is_clients_turn:
            self.since = time.monotonic()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value))
        self._num_headers += 1
        if self._num_headers > MAX_HEADERS:
            raise self._found(HeadTooLarge(f"The request has more than {MAX_HEADERS} headers: send fewer."))
        if self._in_head:  # not behind a chunked body, where proxies do not look
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        if len(self.pipeline) >= MAX_AHEAD:
            raise self._found(BadRequest(f"More than {MAX_AHEAD} requests were sent ahead: wait for an answer."))
        is_last = time.monotonic() > self._last_request
        if is_last:
            self.headers.append((b"connection", b"close"))  # as if the client had asked for it
        super().on_headers_complete()
        self._in_head = False
        self.cycle.keep_alive = self.cycle.keep_alive and not is_last

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self.pipeline and len(body) + sum(len(cycle.body) for cycle, _ in self.pipeline) > MAX_AHEAD_BYTES:
            raise self._found(BadRequest(f"More than {MAX_AHEAD_BYTES} bytes were sent ahead: wait for an answer."))
        super().on_body(body)

    def on_chunk_header(self) -> None:
        self._num_chunks += 1
        if self._num_chunks > FREE_CHUNKS + self._body_bytes // FEW_BYTES:
            raise self._found(
                BadRequest(
                    f"The body comes in more than {FREE_CHUNKS} chunks of less than {FEW_BYTES} bytes: send larger "
                    "chunks, or a Content-Length."
                )
            )

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            self._receiving = False
            super().on_message_complete()

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            raise self._found(_too_large_head())

    def _found(self, fault: RequestError) -> RequestError:
        self._fault = fault
        return fault

    # -- answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._current = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        self.was_answered, self.since = True, time.monotonic()
        super().on_response_complete()

    def _refuse(self, error: RequestError, why: str) -> None:
        """Read no more. Requests that came in whole are answered first, and then the connection ends."""
        self._keeper.closed(why)
        self._refused = True
        if self.pipeline and self.pipeline[0][0].more_body:
            self.pipeline.popleft()
        if self._current is not None and not self.is_clients_turn:
            last = self.pipeline[0][0] if self.pipeline else self._current
            last.keep_alive = False
        else:
            if self._owes_answer:
                self._answer(error)
            else:
                self._say_no_more()
            self.since = time.monotonic()

    def _answer(self, error: RequestError) -> None:
        """In place of the application, which hears that the client has left if it has begun."""
        current = self._current
        if current is not None and not current.response_complete:
            _tell_gone(current)
            if current.response_started:
                self.transport.close()
                return
        self.transport.write(self._raw(error))
        self._say_no_more()

    def _say_no_more(self) -> None:
        if self.transport.can_write_eof():  # not so with TLS
            self.transport.write_eof()

    def _raw(self, error: RequestError) -> bytes:
        scope: Any = self.scope or {}  # without a path before its head is in
        request_id = scope.get("state", {}).get("request_id") or uuid.uuid4().hex
        response = error_response(error, {"path": scope.get("path", ""), "state": {"request_id": request_id}})
        headers = [*self.server_state.default_headers, *response.raw_headers]
        headers += [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
        headers += [(b"connection", b"close")]
        lines = b"".join(b"%s: %s\r\n" % header for header in headers)
        return b"%s%s\r\n%s" % (STATUS_LINE[response.status_code], lines, bytes(response.body))

    def _unsupported_upgrade_warning(self) -> None:
        """No line in the log for what any client may offer."""


def _too_large_head() -> HeadTooLarge:
    return HeadTooLarge(
        f"The request's head has more than {MAX_HEAD_BYTES} bytes, with what follows a chunked body: "
        "send fewer or shorter headers."
    )


def _tell_gone(cycle: RequestResponseCycle) -> None:
    cycle.disconnected = True
    cycle.message_event.set()


def _fault_of(error: httptools.HttpParserError) -> RequestError:
    if isinstance(error.__context__, MemoryError):  # in a callback
        return no_memory()
    return BadRequest(f"The request is no HTTP/1.1: {error}.")


def allow_open_files(max_connections: int) -> None:
    """Raise the process's own limit of open files, as far as the system lets it, to have room for all connections."""
    wanted = max_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        log.warning("%d connections need %d open files; the system allows %d", max_connections, wanted, hard)
        wanted = hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
