"""A client cheap enough to load a server from a core beside it: raw HTTP/1.1 on asyncio streams, 40 µs a request.

Open loop: requests leave when their time has come, whatever the server does, and each records how late it left.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Timers of event loops count whole milliseconds, and a sleeper wakes late: the last stretch is spent polling.
POLL_S = 0.0015


@dataclass(frozen=True, slots=True)
class Reply:
    """One answered request; ``latency_s`` as the client saw it, ``lag_s`` how late it was sent."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    latency_s: float
    lag_s: float = 0.0

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(slots=True)
class Client:
    """Keep-alive connections to ``host``:``port``, opened as they are needed."""

    port: int
    host: str = "127.0.0.1"
    _idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    async def request(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], *, lag_s: float = 0.0
    ) -> Reply:
        """Raises OSError when there is no connection, or none any more, or no answer that we can read."""
        started = time.monotonic()
        reader, writer = await self._connection()
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.host}:{self.port}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        try:
            writer.write("\r\n".join([*lines, "", ""]).encode() + body)
            status, answered, content = await _read(reader)
        except BaseException:  # cancelled, too: the answer may still come, and would be taken for the next one's
            writer.close()
            raise
        latency_s = time.monotonic() - started
        if answered.get("connection") == "close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return Reply(status, answered, content, latency_s, lag_s)

    async def classify(self, image: bytes, headers: Mapping[str, str], *, lag_s: float = 0.0) -> Reply:
        return await self.request("POST", "/v1/classify", image, {"Content-Type": "image/jpeg", **headers}, lag_s=lag_s)

    async def get(self, path: str) -> Reply:
        return await self.request("GET", path, b"", {})

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The one used last that the server has not closed, or a new one."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self.host, self.port)


async def until(due: float) -> None:
    """Return at this instant of ``time.monotonic()``, having let other tasks run at least once."""
    await asyncio.sleep(max(0.0, due - time.monotonic() - POLL_S))
    while time.monotonic() < due:
        await asyncio.sleep(0)


async def closed_loop(
    client: Client, images: Sequence[bytes], headers: Mapping[str, str], *, concurrency: int, seconds: float
) -> list[Reply]:
    """``concurrency`` callers, each sending its next request when the last was answered."""
    replies: list[Reply] = []
    supply, until = itertools.cycle(images), time.monotonic() + seconds

    async def caller() -> None:
        while time.monotonic() < until:
            replies.append(await client.classify(next(supply), headers))

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return replies


async def open_loop(
    client: Client, images: Sequence[bytes], headers: Mapping[str, str], arrivals_s: Iterable[float]
) -> list[Reply]:
    """One request at each of the arrival times, in seconds from now, ascending."""
    supply, started = itertools.cycle(images), time.monotonic()

    async def send(image: bytes, due: float) -> Reply:
        return await client.classify(image, headers, lag_s=time.monotonic() - due)

    sent: list[asyncio.Task[Reply]] = []
    for arrival in arrivals_s:
        await until(started + arrival)
        sent.append(asyncio.create_task(send(next(supply), started + arrival)))
    return list(await asyncio.gather(*sent))


async def _read(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        return int(head[0].split(" ", 2)[1]), headers, await reader.readexactly(int(headers["content-length"]))
    except asyncio.IncompleteReadError:
        raise ConnectionError("the server closed the connection before its answer was complete") from None
    except (asyncio.LimitOverrunError, LookupError, ValueError):
        raise ConnectionError("what answers is no HTTP server that tells how long its answers are") from None
