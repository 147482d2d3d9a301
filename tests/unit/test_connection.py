"""What one connection may do, over real sockets: an application of its own behind it, and a clock that is only told."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest
import trustme
import uvicorn
import uvloop
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from server import connection
from server.connection import (
    FEW_BYTES,
    FREE_CHUNKS,
    MAX_AHEAD,
    MAX_AHEAD_BYTES,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    SEND_BYTES,
    Connection,
    Doorkeeper,
)
from server.tls import Loop

if TYPE_CHECKING:
    from uvicorn._types import ASGIApplication

GET = b"GET /echo HTTP/1.1\r\nHost: a\r\n\r\n"
START = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"
BIG = 16 * 2**20  # more than the sockets of both sides hold
PIECE = 2**16
TIMEOUT_S, KEEP_ALIVE_S = 30.0, 75.0


@dataclass
class Door:
    """A listening socket with the limits under test."""

    max_connections: int
    closed: Counter[str] = field(default_factory=Counter)
    state: ServerState = field(default_factory=ServerState)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    gone: list[str] = field(default_factory=list)
    num_started: int = 0
    num_pieces: int = 0
    clients: list[Client] = field(default_factory=list)
    port: int = 0
    tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        self.keeper = Doorkeeper(self.max_connections, TIMEOUT_S, lambda why: self.closed.update([why]))

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``/echo`` tells headers and body; ``/hold`` waits for the test; ``/unread`` does not wait for the body;
        ``/pieces`` sends ``/big`` as fast as it is taken."""
        self.num_started += 1
        body, more = b"", scope["path"] != "/unread"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone.append(scope["path"])
                return
            body, more = body + message["body"], message["more_body"]
        if scope["path"] == "/hold":
            await self.go_on.wait()
        told = {"headers": [name.decode() for name, _ in scope["headers"]], "body": body.decode()}
        answer = b"x" * BIG if scope["path"] in ("/big", "/pieces") else json.dumps(told).encode()
        head = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        if scope["path"] == "/pieces":
            while len(answer) > PIECE:
                await send({"type": "http.response.body", "body": answer[:PIECE], "more_body": True})
                answer, self.num_pieces = answer[PIECE:], self.num_pieces + 1
        await send({"type": "http.response.body", "body": answer})

    async def opened(self, sent: bytes = b"") -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self.clients.append(client)
        client.writer.write(sent)
        await asyncio.sleep(0.02)  # for the server to have read it
        return client

    def wait(self, **seconds: float) -> None:
        """As if it had been these clients' turn for so long: the silent, the idle and the sending ones."""
        now = time.monotonic()
        for each in cast("set[Connection]", self.state.connections):
            kind = {1.0: "silent", 4.0: "idle", 16.0: "sending"}[each.worth]
            each.since = now - seconds.get(kind, 0.0)

    async def look(self, seconds_later: float) -> None:
        self.keeper.look(cast("set[Connection]", self.state.connections), time.monotonic() + seconds_later)
        await asyncio.sleep(0.02)


@dataclass(frozen=True)
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self) -> tuple[int, dict[str, str], Any]:
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), 5)
        return int(head[0].split()[1]), headers, json.loads(body)

    async def is_closed(self) -> bool:
        """Whether the server ended it, with nothing more to be read."""
        try:
            return await asyncio.wait_for(self.reader.read(1), 0.3) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False


Scenario = Callable[[Door], Awaitable[None]]


@pytest.fixture
def at_door() -> Callable[..., None]:
    def run(scenario: Scenario, max_connections: int = 100, tls: ssl.SSLContext | None = None) -> None:
        async def main() -> None:
            async with listening(Door(max_connections, tls=tls)) as door:
                await scenario(door)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop if tls is None else Loop) as runner:  # what serves
            runner.run(main())

    return run


@asynccontextmanager
async def listening(door: Door) -> AsyncIterator[Door]:
    config = uvicorn.Config(
        cast("ASGIApplication", door.app),
        interface="asgi3",
        proxy_headers=False,
        ws="none",
        log_config=None,
        timeout_keep_alive=int(KEEP_ALIVE_S),
    )
    config.load()
    made = partial(Connection, door.keeper, config=config, server_state=door.state, app_state={})
    server = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0, ssl=door.tls)
    door.port = server.sockets[0].getsockname()[1]
    try:
        yield door
    finally:
        server.close()
        for client in door.clients:
            client.writer.transport.abort()
        await asyncio.sleep(0.02)


async def refused(client: Client, status: int) -> str:
    """The detail of a refusal, after which nothing more can be asked."""
    answered, headers, problem = await client.answer()
    assert (answered, headers["connection"], headers["content-type"]) == (status, "close", "application/problem+json")
    assert problem["request_id"] == headers["x-request-id"]
    assert headers["x-content-type-options"] == "nosniff"
    assert await client.is_closed()
    return str(problem["detail"])


# -- what comes in


def test_usual_requests_are_let_through(at_door: Callable[..., None]) -> None:
    async def scenario(door: Door) -> None:
        client = await door.opened(START + b"some body" + GET)
        assert (await client.answer())[2]["body"] == "some body"
        assert (await client.answer())[0] == 200
        client.writer.write(GET)
        assert (await client.answer())[0] == 200
        assert not door.closed

    at_door(scenario)


def test_a_connection_ends_with_an_answer_after_a_while(
    at_door: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.connection.MIN_AGE_S", 0.1)
    monkeypatch.setattr("server.connection.MAX_AGE_S", 0.1)

    async def scenario(door: Door) -> None:
        client = await door.opened(GET)
        assert "connection" not in (await client.answer())[1]
        await asyncio.sleep(0.1)
        client.writer.write(START + b"some body")
        _, headers, told = await client.answer()
        assert (headers["connection"], told["body"]) == ("close", "some body")
        assert await client.is_closed()
        assert not door.closed

    at_door(scenario)


@pytest.mark.parametrize(
    "head",
    [
        b"X-Long: " + b"x" * (MAX_HEAD_BYTES + 1),
        b"\r\n".join(b"X-%d: %s" % (i, b"x" * 1000) for i in range(MAX_HEAD_BYTES // 1000 + 1)),
        b"\r\n".join(b"X-%d: x" % i for i in range(MAX_HEADERS + 1)),
    ],
)
def test_too_large_a_head_is_refused(at_door: Callable[..., None], head: bytes) -> None:
    async def scenario(door: Door) -> None:
        client = await door.opened(b"GET /echo HTTP/1.1\r\n" + head + b"\r\n\r\n")
        assert str(MAX_HEADERS if b"X-99: x\r\n" in head else MAX_HEAD_BYTES) in await refused(client, 431)
        long_path = await door.opened(b"GET /" + b"x" * MAX_HEAD_BYTES + b" HTTP/1.1\r\n\r\n")
        await refused(long_path, 431)
        assert (door.num_started, door.closed) == (0, {"malformed": 2})

    at_door(scenario)


@pytest.mark.parametrize("piece", [b"x" * 1000, b"x\r\nX: "])
def test_a_head_without_an_end_is_refused_before_it_ends(at_door: Callable[..., None], piece: bytes) -> None:
    async def scenario(door: Door) -> None:
        client = await door.opened(b"GET /echo HTTP/1.1\r\nX: ")
        for _ in range(2 * MAX_HEAD_BYTES // len(piece)):
            client.writer.write(piece)
            await asyncio.sleep(0)
        await refused(client, 431)

    at_door(scenario)


def test_a_head_within_the_limit_may_come_in_small_pieces(at_door: Callable[..., None]) -> None:
    async def scenario(door: Door) -> None:
        value = b"x" * (MAX_HEAD_BYTES // 2 - 100)
        client = await door.opened()
        sent = b"GET /echo HTTP/1.1\r\nX-One: %s\r\nX-Two: %s\r\n\r\n" % (value, value)
        for start in range(0, len(sent), 1000):
            client.writer.write(sent[start : start + 1000])
            await asyncio.sleep(0.001)
        assert (await client.answer())[2]["headers"] == ["x-one", "x-two"]

    at_door(scenario)


@pytest.mark.parametrize(
    ("first", "piece"),
    [
        (b"X: ", b"x" * 1000),
        (b"x", b"x" * 1000),
        (b"", b"X: x\r\n" * 10),
        (b"", b"X: " + b"x" * 1000 + b"\r\n"),
        (b"", b"X: x\r\n" * 65_536),
    ],
)
def test_what_follows_a_chunked_body_without_an_end_is_refused(
    at_door: Callable[..., None], first: bytes, piece: bytes
) -> None:
    async def scenario(door: Door) -> None:
        head = b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        client = await door.opened(head + b"3\r\nabc\r\n0\r\n" + first)
        for _ in range(60):
            client.writer.write(piece)
            await asyncio.sleep(0.001)
        assert str(MAX_HEADERS if piece.startswith(b"X: x\r") else MAX_HEAD_BYTES) in await refused(client, 431)
        assert (door.gone, door.closed) == (["/echo"], {"malformed": 1})

    at_door(scenario)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nX: a\x00b\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nX y: a\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: a\r\n continued\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"POST /echo HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        b"POST /echo HTTP/1.1\r\nContent-Length: +3\r\n\r\nabc",
        b"POST /echo HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked, identity\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding : chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZ\r\nabc\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nabc\r\n0\r\n\r\n",
        b"CONNECT other:443 HTTP/1.1\r\nHost: other\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_two_servers_could_read_differently_is_refused(at_door: Callable[..., None], request_bytes: bytes) -> None:
    async def scenario(door: Door) -> None:
        client = await door.opened(request_bytes + GET)
        await refused(client, 400)
        assert door.closed == {"malformed": 1}

    at_door(scenario)


def test_a_lack_of_memory_is_not_the_clients_fault(
    at_door: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_body(connection: Connection, body: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr("uvicorn.protocols.http.httptools_impl.HttpToolsProtocol.on_body", on_body)

    async def scenario(door: Door) -> None:
        client = await door.opened(START + b"some body")
        assert "no memory" in await refused(client, 503)

    at_door(scenario)


def test_what_follows_a_chunked_body_is_no_header(at_door: Callable[..., None]) -> None:
    async def scenario(door: Door) -> None:
        head = b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        client = await door.opened(head + b"3\r\nabc\r\n0\r\nX-Width: 0.25\r\n\r\n" + GET)
        assert (await client.answer())[2] == {"headers": ["transfer-encoding"], "body": "abc"}
        assert (await client.answer())[2]["headers"] == ["host"]

    at_door(scenario)


def test_a_body_in_very_many_very_small_chunks_is_refused(at_door: Callable[..., None]) -> None:
    async def scenario(door: Door) -> None:
        head = b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        tiny, small, end = b"1\r\nx\r\n", b"%x\r\n%s\r\n" % (FEW_BYTES, b"x" * FEW_BYTES), b"0\r\n\r\n"
        some = await door.opened(head + tiny * (FREE_CHUNKS - 1) + end)
        assert len((await some.answer())[2]["body"]) == FREE_CHUNKS - 1
        many = await door.opened(head + small * 4 * FREE_CHUNKS + end)
        assert len((await many.answer())[2]["body"]) == FEW_BYTES * 4 * FREE_CHUNKS
        assert not door.closed
        too_many = await door.opened(head + tiny * 2 * FREE_CHUNKS + end)
        assert "larger chunks" in await refused(too_many, 400)

    at_door(scenario)


def test_an_upgrade_that_is_only_offered_costs_neither_the_body_nor_the_next_request(
    at_door: Callable[..., None],
) -> None:
    async def scenario(door: Door) -> None:
        offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n"
        client = await door.opened(START.replace(b"Host: a\r\n", offer) + b"some")
        client.writer.write(b" body")
        assert (await client.answer())[2] == {
            "headers": ["connection", "http2-settings", "content-length"],
            "body": "some body",
        }
        client.writer.write(GET)
        assert (await client.answer())[0] == 200
        socket = await door.opened(b"GET /echo HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n" + GET)
        assert [(await socket.answer())[0] for _ in range(2)] == [200, 200]

    at_door(scenario)


# -- requests sent ahead


def test_some_requests_may_be_sent_ahead_and_are_answered_in_order(at_door: Callable[..., None]) -> None:
    async def scenario(door: Door) -> None:
        requests = [START + b"request %d" % i for i in range(MAX_AHEAD + 1)]
        client = await door.opened(b"".join(requests))
        assert [(await client.answer())[2]["body"] for _ in requests] == [f"request {i}" for i in range(MAX_AHEAD + 1)]
        assert not await client.is_closed()

    at_door(scenario)


@pytest.mark.parametrize("ahead", [10_000 * GET, START.replace(b"9", b"99999") + b"x" * (MAX_AHEAD_BYTES + 1)])
def test_too_much_sent_ahead_ends_the_connection_behind_what_was_asked_before(
    at_door: Callable[..., None], ahead: bytes
) -> None:
    async def scenario(door: Door) -> None:
        client = await door.opened(GET.replace(b"echo", b"hold") + ahead)
        await asyncio.sleep(0.05)
        assert (door.num_started, door.closed) == (1, {"malformed": 1})
        door.go_on.set()
        answers = [await client.answer() for _ in range(1 + MAX_AHEAD * (GET in ahead))]
        assert [status for status, _, _ in answers] == [200] * len(answers)
        assert answers[-1][1]["connection"] == "close"
        assert await client.is_closed()

    at_door(scenario)


def test_nonsense_behind_a_request_does_not_cost_its_answer(at_door: Callable[..., None]) -> None:
    async def scenario(door: Door) -> None:
        client = await door.opened(GET.replace(b"echo", b"hold") + b"nonsense\r\n\r\n")
        door.go_on.set()
        assert (await client.answer())[1]["connection"] == "close"
        assert await client.is_closed()

    at_door(scenario)


@pytest.mark.parametrize("path", [b"echo", b"hold"])
def test_a_client_that_closes_its_side_has_left(at_door: Callable[..., None], path: bytes) -> None:
    """Half a request or a whole one: that looks like a client that has given up, whose image nobody shall work on."""

    async def scenario(door: Door) -> None:
        client = await door.opened(START.replace(b"echo", path) + (b"some body" if path == b"hold" else b"some"))
        client.writer.write_eof()
        assert await client.is_closed()
        assert len(door.state.connections) == 0
        assert door.gone == ["/echo"] * (path == b"echo")

    at_door(scenario)


def test_a_client_that_leaves_with_requests_sent_ahead_is_missed(at_door: Callable[..., None]) -> None:
    async def scenario(door: Door) -> None:
        client = await door.opened(START[:-4] + b"\r\n\r\nsome " + b"")
        client.writer.close()
        await asyncio.sleep(0.05)
        assert door.gone == ["/echo"]

    at_door(scenario)


# -- time


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"GET /echo HTTP/1.1\r\nX-", START, START + b"some"])
def test_who_does_not_send_a_request_is_not_waited_for_without_end(at_door: Callable[..., None], sent: bytes) -> None:
    async def scenario(door: Door) -> None:
        client = await door.opened(sent)
        await door.look(TIMEOUT_S - 1)
        assert not door.closed
        await door.look(TIMEOUT_S + 1)
        assert door.closed == {"slow": 1}
        if sent.strip():
            assert "SCALA_CLIENT_TIMEOUT_S" in await refused(client, 408)
        else:
            assert await client.is_closed()
        assert door.gone == ["/echo"] * sent.startswith(START)

    at_door(scenario)


def test_the_first_byte_of_another_request_stops_no_clock(at_door: Callable[..., None]) -> None:
    async def scenario(door: Door) -> None:
        client = await door.opened(GET)
        await client.answer()
        client.writer.write(b"GET")
        await asyncio.sleep(0.02)
        await door.look(TIMEOUT_S + 1)
        await refused(client, 408)

    at_door(scenario)


def test_an_idle_connection_is_closed_without_a_word(at_door: Callable[..., None]) -> None:
    async def scenario(door: Door) -> None:
        client = await door.opened(GET)
        await client.answer()
        client.writer.write(b"\r\n")  # at which uvicorn's own timer stops
        await asyncio.sleep(0.02)
        await door.look(KEEP_ALIVE_S - 1)
        assert not await client.is_closed()
        await door.look(KEEP_ALIVE_S + 1)
        assert await client.is_closed()
        assert not door.closed

    at_door(scenario)


def test_the_servers_own_time_is_not_the_clients(at_door: Callable[..., None]) -> None:
    async def scenario(door: Door) -> None:
        client = await door.opened(GET.replace(b"echo", b"hold"))
        await door.look(1000)
        door.go_on.set()
        assert (await client.answer())[0] == 200

    at_door(scenario)


def test_the_rest_of_a_body_that_was_refused_is_not_taken_without_end(at_door: Callable[..., None]) -> None:
    async def scenario(door: Door) -> None:
        client = await door.opened(START.replace(b"echo", b"unread"))
        assert (await client.answer())[0] == 200
        await door.look(TIMEOUT_S + 1)
        assert await client.is_closed()
        assert door.closed == {"slow": 1}

    at_door(scenario)


def test_an_answer_that_nobody_takes_is_not_kept(at_door: Callable[..., None]) -> None:
    async def scenario(door: Door) -> None:
        await door.opened(GET.replace(b"echo", b"big"))
        await door.look(0)
        await door.look(TIMEOUT_S - 1)
        assert len(door.state.connections) == 1
        await door.look(TIMEOUT_S + 1)
        assert (len(door.state.connections), door.closed) == (0, {"slow": 1})

    at_door(scenario)


def test_an_answer_that_is_taken_in_time_is_whole(at_door: Callable[..., None]) -> None:
    async def scenario(door: Door) -> None:
        client = await door.opened(GET.replace(b"echo", b"big"))
        await door.look(0)
        await client.reader.readuntil(b"\r\n\r\n")
        assert await client.reader.readexactly(BIG) == b"x" * BIG
        await door.look(TIMEOUT_S + 1)
        assert not await client.is_closed()

    at_door(scenario)


def test_who_was_refused_and_stays_is_left(at_door: Callable[..., None]) -> None:
    async def scenario(door: Door) -> None:
        client = await door.opened(b"nonsense\r\n\r\n")
        client.writer.write(b"and more")
        await door.look(connection.LINGER_S + 1)
        assert len(door.state.connections) == 0
        assert client.reader is not None

    at_door(scenario)


# -- room


def test_of_too_many_connections_those_go_that_were_waited_for_longest_for_what_they_are_worth(
    at_door: Callable[..., None],
) -> None:
    async def scenario(door: Door) -> None:
        idle = await door.opened(GET)
        await idle.answer()
        held = await door.opened(GET.replace(b"echo", b"hold"))
        silent, sending = await door.opened(), await door.opened(START)
        door.wait(silent=1, idle=3, sending=10)
        newcomers = [await door.opened(GET.replace(b"echo", b"hold"))]
        assert "SCALA_MAX_CONNECTIONS is 4" in await refused(silent, 503)
        door.wait(idle=5, sending=15)
        newcomers.append(await door.opened(GET.replace(b"echo", b"hold")))
        assert await idle.is_closed(), "without a word"
        await door.opened()
        assert "try again" in await refused(sending, 503)
        assert door.gone == ["/echo"]
        door.go_on.set()
        for each in (held, *newcomers):
            assert (await each.answer())[0] == 200, "nobody is interrupted who is being answered"
        assert door.closed == {"full": 3}

    at_door(scenario, max_connections=4)


@pytest.mark.parametrize("held", [b"", GET, START], ids=["nothing", "a request", "half a request"])
def test_who_holds_all_connections_and_opens_more_does_not_keep_others_from_uploading(
    at_door: Callable[..., None], held: bytes
) -> None:
    async def scenario(door: Door) -> None:
        for _ in range(20):
            await door.opened(held)
        honest = await door.opened(START)
        for _ in range(15):
            await door.opened(held)
        honest.writer.write(b"some body")
        assert (await honest.answer())[0] == 200
        assert len(door.state.connections) == 20

    at_door(scenario, max_connections=20)


def test_when_all_connections_are_being_answered_the_newest_is_refused(at_door: Callable[..., None]) -> None:
    async def scenario(door: Door) -> None:
        held = [await door.opened(GET.replace(b"echo", b"hold")) for _ in range(3)]
        await refused(await door.opened(), 503)
        door.go_on.set()
        assert [(await each.answer())[0] for each in held] == [200, 200, 200]
        idle, newest = held[0], await door.opened(GET)
        assert (await newest.answer())[0] == 200
        assert await idle.is_closed(), "who waited longest, without a word"

    at_door(scenario, max_connections=3)


def test_little_waits_for_who_does_not_take_an_answer(at_door: Callable[..., None]) -> None:
    """Of itself the system takes 4 MB for each: 100 that asked for six times 1.5 held all others up for 0.4 s."""

    async def scenario(door: Door) -> None:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with client:
            client.connect(("127.0.0.1", door.port))
            client.sendall(GET.replace(b"echo", b"pieces"))
            await asyncio.sleep(0.3)
        assert 1 <= door.num_pieces * PIECE / SEND_BYTES <= 4

    at_door(scenario)


def test_who_does_not_take_an_answer_gives_way(at_door: Callable[..., None]) -> None:
    async def scenario(door: Door) -> None:
        unread = [await door.opened(GET.replace(b"echo", b"pieces")) for _ in range(2)]
        held = await door.opened(GET.replace(b"echo", b"hold"))
        await door.look(0)
        newcomers = [await door.opened(GET.replace(b"echo", b"hold")) for _ in range(2)]
        for each in unread:
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await each.reader.readexactly(BIG)
        door.go_on.set()
        assert [(await each.answer())[0] for each in (held, *newcomers)] == [200, 200, 200]
        assert door.closed == {"full": 2}

    at_door(scenario, max_connections=3)


NO_REQUESTS = [b"nonsense\r\n\r\n", b"CONNECT other:443 HTTP/1.1\r\n\r\n", b"GET http://[ HTTP/1.1\r\n\r\n"]


@pytest.mark.parametrize("nonsense", NO_REQUESTS)
def test_who_was_refused_and_stays_gives_way_without_another_word(
    at_door: Callable[..., None], nonsense: bytes
) -> None:
    async def scenario(door: Door) -> None:
        before = [await door.opened(nonsense) for _ in range(2)]
        assert (await (await door.opened(GET)).answer())[0] == 200
        for each in before:
            assert each.reader._buffer.count(b"HTTP/1.1 ") == 1  # type: ignore[attr-defined]
        assert len(door.state.connections) == 2

    at_door(scenario, max_connections=2)


@pytest.mark.parametrize("nonsense", NO_REQUESTS)
def test_nonsense_on_a_connection_that_was_answered_is_refused_once(
    at_door: Callable[..., None], nonsense: bytes
) -> None:
    async def scenario(door: Door) -> None:
        client = await door.opened(GET)
        await client.answer()
        client.writer.write(nonsense)
        await refused(client, 400)
        await door.look(1)
        assert len(door.state.connections) == 1
        await door.look(connection.LINGER_S + 1)
        assert len(door.state.connections) == 0

    at_door(scenario)


def test_nonsense_in_the_rest_of_a_body_that_was_answered_already_is_not_answered(at_door: Callable[..., None]) -> None:
    async def scenario(door: Door) -> None:
        head = b"POST /unread HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        client = await door.opened(head)
        assert (await client.answer())[0] == 200
        client.writer.write(b"nonsense\r\n")
        assert await client.is_closed()
        assert door.closed == {"malformed": 1}

    at_door(scenario)


def test_a_fault_with_one_connection_stays_with_it(
    at_door: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(_: object) -> None:
        raise RuntimeError("a bug")

    async def scenario(door: Door) -> None:
        monkeypatch.setattr(Connection, "_lose_patience", fault)
        await door.opened()
        await door.look(TIMEOUT_S + 1)
        assert len(door.state.connections) == 0
        monkeypatch.setattr(Connection, "_answer", fault)
        for _ in range(2):
            await door.opened()
        newest = await door.opened(GET)
        assert (await newest.answer())[0] == 200
        assert caplog.text.count("could not be looked after") == 2

    at_door(scenario, max_connections=2)


def test_many_connections_that_end_at_a_time_do_not_hold_up_the_others(
    at_door: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_looks, most = 0, 0
    look = Connection.look

    def counted(self: Connection, now: float) -> None:
        nonlocal num_looks
        num_looks += 1
        look(self, now)

    async def turns() -> None:
        nonlocal num_looks, most
        while True:
            num_looks = 0
            await asyncio.sleep(0)
            most = max(most, num_looks)

    async def scenario(door: Door) -> None:
        for _ in range(200):
            door.clients.append(Client(*await asyncio.open_connection("127.0.0.1", door.port)))
        await asyncio.sleep(0.02)
        monkeypatch.setattr(Connection, "look", counted)
        counting = asyncio.create_task(turns())
        await door.look(TIMEOUT_S + 1)
        assert door.closed == {"slow": 200}
        assert 0 < most <= 100
        counting.cancel()

    at_door(scenario, max_connections=1000)


@dataclass(frozen=True)
class Tls:
    """Both sides' parts of an encrypted connection; its clients do nothing that they are not told to."""

    server: ssl.SSLContext = field(default_factory=lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    client: ssl.SSLContext = field(default_factory=ssl.create_default_context)

    def opened(self, port: int, sent: bytes = b"") -> ssl.SSLSocket:
        connection = socket.create_connection(("127.0.0.1", port), timeout=5)
        secured = self.client.wrap_socket(connection, server_hostname="localhost")
        secured.sendall(sent)
        return secured


@pytest.fixture(scope="module")
def tls() -> Tls:
    ca, tls = trustme.CA(), Tls()
    ca.issue_cert("localhost").configure_cert(tls.server)
    ca.configure_trust(tls.client)
    return tls


def num_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_client_of_tls_that_gives_way_keeps_no_file_by_not_agreeing(at_door: Callable[..., None], tls: Tls) -> None:
    async def scenario(door: Door) -> None:
        before = num_files()
        clients = [await asyncio.to_thread(tls.opened, door.port) for _ in range(40)]
        await asyncio.sleep(3 * connection.FAREWELL_S)
        assert num_files() - before - len(clients) <= 5
        assert b" 503 " in clients[0].recv(4096).partition(b"\r\n")[0]
        newest = await asyncio.to_thread(tls.opened, door.port, GET)
        assert b" 200 " in (await asyncio.to_thread(newest.recv, 4096)).partition(b"\r\n")[0]
        for each in (*clients, newest):
            each.close()

    at_door(scenario, max_connections=5, tls=tls.server)


def test_a_client_of_tls_that_was_too_slow_is_counted_once(at_door: Callable[..., None], tls: Tls) -> None:
    async def scenario(door: Door) -> None:
        silent = await asyncio.to_thread(tls.opened, door.port)
        await asyncio.sleep(0.02)
        for _ in range(3):
            await door.look(TIMEOUT_S + 1)
        assert door.closed == {"slow": 1}
        silent.close()

    at_door(scenario, tls=tls.server)


def test_a_handshake_that_stops_is_given_up(
    at_door: Callable[..., None], tls: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.tls.HANDSHAKE_S", 0.5)

    async def scenario(door: Door) -> None:
        before = num_files()
        clients = [await door.opened() for _ in range(10)]
        assert num_files() - before == 2 * len(clients)
        await asyncio.sleep(0.6)
        for each in clients:
            assert await each.is_closed()
        assert num_files() - before == len(clients)

    at_door(scenario, tls=tls.server)
