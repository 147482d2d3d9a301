"""A load generator for a server on this machine: raw HTTP/1.1 on asyncio streams, cheap enough to share two cores.

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
    """Keep-alive connections to 127.0.0.1:``port``, opened as they are needed."""

    port: int
    _idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    async def request(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], *, lag_s: float = 0.0
    ) -> Reply:
        started = time.monotonic()
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self.port)
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        status, answered, content = await _read(reader)
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
    sent: list[asyncio.Task[Reply]] = []
    for arrival in arrivals_s:
        due = started + arrival
        if (wait := due - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        lag_s = time.monotonic() - due
        sent.append(asyncio.create_task(client.classify(next(supply), headers, lag_s=lag_s)))
    return list(await asyncio.gather(*sent))


async def _read(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    return int(head[0].split(" ", 2)[1]), headers, await reader.readexactly(int(headers["content-length"]))
