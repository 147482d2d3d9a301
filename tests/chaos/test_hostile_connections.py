"""What a stranger can do with connections, to a real server; meanwhile a well-behaved client is served all along."""

from __future__ import annotations

import asyncio
import resource
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

import psutil
import pytest

from server.bench.client import Client, until
from tests.chaos.conftest import Tally
from tests.chaos.well import check_log, healthy_after
from tests.service.service_process import Running, serving

TIMEOUT_S = 4.0  # the server's SCALA_CLIENT_TIMEOUT_S here, for the test not to take as long as its default
GONE_S = TIMEOUT_S + 5  # the server looks once a second, and lets who was refused read why for two
MAX_CONNECTIONS = 1000
NUM_CONNECTIONS = 10_000
BUDGET_MS = 500
NOISE_MS = 250  # of two cores that are shared with the attacker, and with whatever else runs; the promise is 50
MAX_MORE_FILES = 10  # open for a moment, as for a new plan
EVERY_S, TICK_S = 0.05, 0.005
HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Type: image/jpeg\r\n"
EXPECTED = frozenset({200, 400, 404, 405, 408, 413, 415, 422, 429, 431, 503, 504})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(log, CLIENT_TIMEOUT_S=str(TIMEOUT_S), MAX_CONNECTIONS=str(MAX_CONNECTIONS)) as running:
        running.wait_measured()
        yield running
        check_log(log)


@dataclass
class Bystander:
    """A well-behaved client: a request every ``EVERY_S``, half of them on new connections."""

    port: int
    photos: Sequence[bytes]
    stalled_s: float = 0.0  # that this process stood still: the attackers' doing, or the machine's, not the server's
    statuses: Counter[int] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)
    lost: int = 0

    async def watch_itself(self) -> None:
        while True:
            due = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            self.stalled_s += max(0.0, time.monotonic() - due)

    async def keep_asking(self) -> None:
        kept, place = Client(self.port), 0
        due = time.monotonic()
        try:
            while True:
                fresh = Client(self.port)
                try:
                    await self._ask(kept if place % 2 else fresh, self.photos[place % len(self.photos)])
                finally:
                    fresh.close()
                place, due = place + 1, max(due + EVERY_S, time.monotonic())
                await until(due)
        finally:
            kept.close()

    async def _ask(self, client: Client, photo: bytes) -> None:
        started, stalled_s = time.monotonic(), self.stalled_s
        try:
            reply = await client.classify(photo, {"X-Latency-Budget-Ms": str(BUDGET_MS)})
        except OSError:
            self.lost += 1
            return
        self.statuses[reply.status] += 1
        await asyncio.sleep(TICK_S)  # for a standstill that has just ended to be known
        self.latencies_ms.append(1000 * (time.monotonic() - started - TICK_S - (self.stalled_s - stalled_s)))

    def summary(self) -> str:
        ordered = sorted(self.latencies_ms)
        p50, most = ordered[len(ordered) // 2], ordered[-1]
        told = ", ".join(f"{count} x {status}" for status, count in sorted(self.statuses.items()))
        return f"a well-behaved client: {told}, p50 {p50:.0f} ms, worst {most:.0f} ms"


@dataclass(frozen=True)
class Attack:
    """The server under attack, who is served meanwhile, and what the attackers are told."""

    server: Running
    bystander: Bystander
    answers: Counter[int] = field(default_factory=Counter)

    async def opened(self, sent: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        writer.write(sent)
        return reader, writer

    async def sends(self, sent: bytes, wait_s: float = 10) -> bytes:
        """All that is answered to these bytes until the server closes or says no more."""
        reader, writer = await self.opened(sent)
        answer = b""
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(wait_s):
                while piece := await reader.read(65_536):
                    answer += piece
        writer.close()
        self.note(answer)
        return answer

    def note(self, answer: bytes) -> None:
        """Every answer begins as an answer should, and is none that nobody could foresee."""
        if not answer:
            self.answers[0] += 1
            return
        version, status, _ = answer.split(b" ", 2)
        assert version == b"HTTP/1.1"
        assert int(status) in EXPECTED, answer[:500]
        self.answers[int(status)] += 1
        if int(status) >= 400:
            assert b"application/problem+json" in answer, answer[:500]

    def told(self) -> str:
        names = {0: "closed without a word"}
        return ", ".join(f"{count} x {names.get(status, status)}" for status, count in sorted(self.answers.items()))


Scenario = Callable[[Attack], Awaitable[None]]
Attacked = Callable[..., Attack]  # of a name and a scenario, and whether the attackers say anything


@pytest.fixture(scope="module")
def num_files(server: Running) -> int:
    """That the server has open when nobody is connected."""
    server.wait_until(lambda: connections(server) <= 1)
    return int(psutil.Process(server.process.pid).num_fds())


@pytest.fixture
def attacked(server: Running, num_files: int, photos: list[bytes], tally: Tally) -> Attacked:
    """Runs an attack beside a well-behaved client, which must be served; notes both, and how soon all is well after.

    In the end the server has nothing of it open.
    """
    process = psutil.Process(server.process.pid)

    def run(name: str, scenario: Scenario, says_anything: bool = True) -> Attack:
        attack = Attack(server, Bystander(server.port, photos))
        asyncio.run(_beside(attack.bystander, scenario(attack)))
        recovery_s = healthy_after(server, photos[0])
        bystander = attack.bystander
        num_attempts = attack.answers.total()
        tally.inputs(num_attempts if says_anything else 0)
        tally.connections(num_attempts)
        tally.requests(bystander.statuses.total() + bystander.lost, bystander.lost)
        tally.fault(name, f"attackers: {attack.told()}; {bystander.summary()}", recovery_s)
        assert bystander.lost == 0, bystander
        assert set(bystander.statuses) <= {200, 429, 504}, bystander.summary()
        assert bystander.statuses[200] >= 0.9 * bystander.statuses.total(), bystander.summary()
        assert max(bystander.latencies_ms) < BUDGET_MS + NOISE_MS, bystander.summary()
        assert recovery_s < 5
        server.wait_until(lambda: process.num_fds() <= num_files + MAX_MORE_FILES)
        return attack

    return run


async def _beside(bystander: Bystander, attack: Awaitable[None]) -> None:
    watching = asyncio.create_task(bystander.watch_itself())
    asking = asyncio.create_task(bystander.keep_asking())
    await asyncio.sleep(0.3)
    try:
        async with asyncio.timeout(60):
            await attack
    finally:
        asking.cancel()
        watching.cancel()
        await asyncio.wait([asking, watching])
    if (error := None if asking.cancelled() else asking.exception()) is not None:
        raise error


@asynccontextmanager
async def many(attack: Attack, count: int, sent: bytes) -> AsyncIterator[list[asyncio.StreamWriter]]:
    """So many connections that have sent this, all gone at the end; of each it is noted what it was told."""
    opened: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    try:
        for start in range(0, count, 100):
            opened += await asyncio.gather(*(attack.opened(sent) for _ in range(min(100, count - start))))
        yield [writer for _, writer in opened]
    finally:
        for reader, writer in opened:
            with suppress(ConnectionError):
                attack.note(bytes(reader._buffer))  # type: ignore[attr-defined]  # what has come, without waiting
            writer.close()


def connections(server: Running) -> int:
    """How many the server has open."""
    lines = server.http.get("/metrics").text.splitlines()
    return int(float(next(line.split()[1] for line in lines if line.startswith("scala_connections "))))


def test_an_open_connection_is_cheap(server: Running, tally: Tally) -> None:
    """The first of all here, as memory that an attack has freed would serve again."""
    attack, count = Attack(server, Bystander(server.port, [])), 900

    async def held_bytes() -> float:
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        async with many(attack, count, b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"):
            await asyncio.sleep(1)
            assert connections(server) > count
            return float(process.memory_info().rss - before) / count

    each_bytes = asyncio.run(held_bytes())
    tally.connections(count)
    tally.requests(count, count - attack.answers[200])
    tally.fault(f"{count} idle connections", f"{each_bytes / 1000:.0f} KB of memory each", None)
    assert attack.answers[200] == count
    assert each_bytes < 30_000


ODD_HEADS = {
    "5,000 headers": b"".join(b"X-%d: x\r\n" % i for i in range(5000)),
    "a value of 4 MB": b"X-Long: " + b"x" * 4_000_000 + b"\r\n",
    "a name of 1 MB": b"x" * 1_000_000 + b": 1\r\n",
    "NUL in a value": b"X-Width: 0\x005\r\n",
    "NUL in a name": b"X-Wid\x00th: 1\r\n",
    "bytes that are no ASCII": b"X-Request-Id: \xff\xfe\xc3\x28\r\nX-Width: \xe2\x82\xac\r\n",
    "50 budgets": b"X-Latency-Budget-Ms: 100\r\n" * 50,
    "a length of 30 digits": b"Content-Length: " + b"9" * 30 + b"\r\n",
    "an unknown expectation": b"Expect: 200-maybe\r\nContent-Length: 5\r\n",
    "an upgrade": b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n",
}
# What two servers in a row might read as one request and as two (RFC 9112, section 11.2).
AMBIGUOUS_HEADS = {
    "a folded line": b"X-Width: 1\r\n .0\r\n",
    "a bare line feed": b"X-Width: 1\nContent-Length: 5\r\n",
    "a bare carriage return": b"X-Width: 1\rContent-Length: 5\r\n",
    "a space before the colon": b"Content-Length : 5\r\n",
    "two equal lengths": b"Content-Length: 5\r\nContent-Length: 5\r\n",
    "two lengths": b"Content-Length: 5\r\nContent-Length: 50\r\n",
    "a list of lengths": b"Content-Length: 5, 50\r\n",
    "a negative length": b"Content-Length: -5\r\n",
    "a hexadecimal length": b"Content-Length: 0x5\r\n",
    "a length and chunks": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
    "chunks and a length": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
    "chunked, then not": b"Transfer-Encoding: chunked, identity\r\n",
    "nearly chunked": b"Transfer-Encoding: xchunked\r\n",
    "a length of a chunk with a sign": b"Transfer-Encoding: chunked\r\n\r\n+5\r\nabcde\r\n",
}
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


def test_heads_of_any_size_and_shape(attacked: Attacked) -> None:
    async def scenario(attack: Attack) -> None:
        for _ in range(3):
            for name, lines in ODD_HEADS.items():
                assert await attack.sends(HEAD + lines + b"\r\n0\r\n\r\n", wait_s=1), f"{name}: no answer"
            for name, lines in AMBIGUOUS_HEADS.items():
                answer = await attack.sends(HEAD + lines + b"\r\n0\r\n\r\n" + SMUGGLED)
                assert answer.startswith(b"HTTP/1.1 400 "), f"{name}: {answer[:300]!r}"
                assert answer.count(b"HTTP/1.1 ") == 1, f"{name}: {answer[:3000]!r}"

    attacked("absurd, ambiguous and huge heads", scenario)


def test_chunks_that_never_end(attacked: Attacked) -> None:
    async def scenario(attack: Attack) -> None:
        async def sender(piece: bytes, pause_s: float) -> None:
            reader, writer = await attack.opened(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            answering = asyncio.create_task(reader.read(4096))
            with suppress(ConnectionError):
                while not answering.done():
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(pause_s)
            with suppress(ConnectionError):
                attack.note(await answering)
            answering.cancel()
            writer.close()

        quick = [sender(b"10000\r\n" + bytes(65_536) + b"\r\n", 0.001) for _ in range(8)]
        slow = [sender(b"1\r\nx\r\n", 0.1) for _ in range(100)]
        extended = [sender(b"1;" + b"x" * 10_000 + b"\r\nx\r\n", 0.01) for _ in range(4)]
        await asyncio.gather(*quick, *slow, *extended)

    attack = attacked("chunked bodies without an end", scenario)
    assert attack.answers[413] + attack.answers[429] >= 8, attack.told()
    assert attack.answers[408] >= 100, attack.told()


@pytest.mark.parametrize(
    ("name", "start", "piece"),
    [
        ("heads that come a byte at a time", b"GET /livez HTTP/1.1\r\nX-Slow: ", b"x"),
        ("heads that come a line at a time", b"GET /livez HTTP/1.1\r\n", b"X-Slow: x\r\n"),
        (
            "bodies that come a byte at a time",
            HEAD + b"X-Latency-Budget-Ms: 600000\r\nContent-Length: 50000\r\n\r\n",
            b"x",
        ),
    ],
)
def test_slow_senders(attacked: Attacked, name: str, start: bytes, piece: bytes) -> None:
    async def scenario(attack: Attack) -> None:
        async with many(attack, 800, start) as writers:
            ends = time.monotonic() + GONE_S
            while time.monotonic() < ends:
                for writer in writers:
                    if not writer.is_closing():
                        writer.write(piece)
                await asyncio.sleep(0.5)
            assert connections(attack.server) < 20

    attack = attacked(f"800 {name}", scenario)
    # Whoever sent a piece while the connection was being closed may have lost the answer with it.
    assert attack.answers[408] >= 700, attack.told()


def test_more_slow_bodies_than_there_may_be_connections(attacked: Attacked) -> None:
    async def scenario(attack: Attack) -> None:
        start = HEAD + b"X-Latency-Budget-Ms: 600000\r\nContent-Length: 50000\r\n\r\n"
        for _ in range(3):
            async with many(attack, MAX_CONNECTIONS, start):
                await asyncio.sleep(1)

    attacked(f"3 times {MAX_CONNECTIONS} uploads that stop", scenario)


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("say nothing", b""),
        ("have asked for a trifle", b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("begin to upload", HEAD + b"X-Latency-Budget-Ms: 600000\r\nContent-Length: 50000\r\n\r\n"),
    ],
    ids=["silent", "idle", "uploading"],
)
def test_all_connections_held_and_200_new_ones_a_second(
    attacked: Attacked, photos: list[bytes], name: str, sent: bytes
) -> None:
    async def scenario(attack: Attack) -> None:
        async def keep_opening() -> None:
            async with AsyncExitStack() as held:
                for _ in range(MAX_CONNECTIONS // 20):
                    await held.enter_async_context(many(attack, 20, sent))
                    await asyncio.sleep(0.02)
                for _ in range(60):
                    await held.enter_async_context(many(attack, 10, sent))
                    await asyncio.sleep(0.05)

        opening = asyncio.create_task(keep_opening())
        await asyncio.sleep(1)
        head = HEAD + b"X-Latency-Budget-Ms: 2000\r\nContent-Length: %d\r\n\r\n" % len(photos[0])
        statuses = Counter[bytes]()
        while not opening.done():
            reader, writer = await attack.opened(head + photos[0][:100])
            await asyncio.sleep(0.5)
            writer.write(photos[0][100:])
            statuses[(await asyncio.wait_for(reader.read(4096), 5))[:13]] += 1
            writer.close()
        await opening
        assert set(statuses) == {b"HTTP/1.1 200 "}, statuses

    attacked(f"{MAX_CONNECTIONS} connections that {name}, and 200 new ones a second", scenario)


def test_half_closed_and_reset_connections(attacked: Attacked, photos: list[bytes]) -> None:
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(photos[0]) + photos[0]
    places = (0, 1, 20, len(HEAD), len(HEAD) + 30, len(whole) - 1, len(whole))

    async def scenario(attack: Attack) -> None:
        for place in places * 30:
            reader, writer = await attack.opened(whole[:place])
            writer.write_eof()
            with suppress(ConnectionError):
                attack.note(await asyncio.wait_for(reader.read(), 5))
            writer.close()
            _, writer = await attack.opened(whole[:place])
            linger = struct.pack("ii", 1, 0)  # closing is a reset then
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()
            attack.note(b"")

    attack = attacked("half-closed sockets, and clients gone at any point", scenario)
    # Who closes his side has left: at best an answer was faster.
    assert attack.answers[0] + attack.answers[200] == 2 * 30 * len(places), attack.told()


def test_requests_sent_ahead(attacked: Attacked, photos: list[bytes]) -> None:
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(photos[0]) + photos[0]

    async def scenario(attack: Attack) -> None:
        for sent in (b"GET /livez HTTP/1.1\r\n\r\n" * 20_000, whole * 200, (whole + b"GET / HTTP/1.1\r\n\r\n") * 50):
            for _ in range(10):
                answer = await attack.sends(sent)
                assert answer.count(b"HTTP/1.1 200 OK") >= 1
                assert b"connection: close" in answer.lower()

    attacked("thousands of requests sent ahead", scenario)


def test_readers_that_do_not_read(attacked: Attacked) -> None:
    async def scenario(attack: Attack) -> None:
        before = psutil.Process(attack.server.process.pid).memory_info().rss
        # Six times 1.5 MB: the sockets of both sides hold up to 6 MB.
        page = b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: a\r\n\r\n" * 6
        sockets = []
        try:
            for _ in range(100):
                each = socket.socket()
                each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                each.connect(("127.0.0.1", attack.server.port))
                each.sendall(page)
                sockets.append(each)
                await asyncio.sleep(0.01)
            await asyncio.sleep(1)
            assert connections(attack.server) >= 100
            await asyncio.sleep(GONE_S)
            assert connections(attack.server) < 20
            held_mib = (psutil.Process(attack.server.process.pid).memory_info().rss - before) / 2**20
            assert held_mib < 100, "less than one answer each"
        finally:
            for each in sockets:
                attack.note(_received(each))
                each.close()

    attacked("100 clients that do not take their answer", scenario)


def _received(connection: socket.socket) -> bytes:
    connection.setblocking(False)
    answer = b""
    with suppress(OSError):
        while piece := connection.recv(65_536):
            answer += piece
    return answer.partition(b"\r\n")[0]


def test_ten_thousand_connections(attacked: Attacked) -> None:
    count = min(NUM_CONNECTIONS, _most_connections())

    async def scenario(attack: Attack) -> None:
        async with many(attack, count, b""):
            assert connections(attack.server) <= MAX_CONNECTIONS
            await asyncio.sleep(1)

    why = "" if count == NUM_CONNECTIONS else ", as many as this machine lets a process open"
    attack = attacked(f"{count:,} connections that say nothing{why}", scenario, says_anything=False)
    assert attack.answers.total() == count


def _most_connections() -> int:
    """Of this process, its limit of open files raised as far as it may be."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard - 1000 if hard != resource.RLIM_INFINITY else NUM_CONNECTIONS
