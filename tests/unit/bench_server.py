"""A server of a few lines, and runs made by hand, for the tests of the load generator."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np

from server.bench.client import Client
from server.bench.photos import Photos
from server.bench.play import play, run
from server.bench.records import Records
from server.simulation.workload import Workload

CLASSES = ["cat", "dog"]
Answer = tuple[int, dict[str, Any]]
Answers = Callable[[bytes, dict[str, str]], Answer]  # of an image and a request's headers, in lower case


def load_of(arrivals_s: Sequence[float], budgets_ms: Sequence[float], images: Sequence[int] | None = None) -> Workload:
    count = len(arrivals_s)
    numbers = np.zeros(count, np.int64) if images is None else np.array(images)
    return Workload("by hand", np.array(arrivals_s, float), np.array(budgets_ms) / 1000, numbers)


PHOTOS = Photos({0: b"image of a cat", 1: b"image of a dog"}, np.array([0, 1]), CLASSES)


def answer(class_id: int, width: float = 0.5, *, met: bool = True) -> Answer:
    return 200, {"predictions": [{"class_id": class_id}], "width": width, "budget_met": met}


class FakeServer:
    """Answers with what it is told, after a while, on a loop in a thread of its own. ``requests`` are those it got."""

    def __init__(self, answers: Answers, delay_s: float = 0.0, *, raw: bytes | None = None) -> None:
        self.answers, self.delay_s, self.raw = answers, delay_s, raw
        self.requests: list[tuple[bytes, dict[str, str]]] = []
        self.connections: set[asyncio.Task[None]] = set()
        self.num_connections = self.num_scrapes = self.port = 0

    async def serve(self, ready: threading.Event, done: asyncio.Event) -> None:
        server = await asyncio.start_server(self.connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await done.wait()
        server.close()
        for connection in self.connections:
            connection.cancel()
        await asyncio.gather(*self.connections, return_exceptions=True)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        self.num_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                pairs = (line.split(": ", 1) for line in head[1:] if line)
                headers = {name.lower(): value for name, value in pairs}
                body = await reader.readexactly(int(headers["content-length"]))
                writer.write(self.raw or await self.reply(head[0].split()[1], body, headers))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()

    async def reply(self, path: str, body: bytes, headers: dict[str, str]) -> bytes:
        if path == "/v1/model":
            return http(200, json.dumps({"name": "toy", "classes": CLASSES}).encode())
        if path == "/metrics":
            self.num_scrapes += 1
            counters = ('scala_budget_total{outcome="met"} 7', 'scala_batch_size_bucket{le="2.0"} 3')
            grown = (f"{name} {int(step) * self.num_scrapes}.0" for name, step in map(str.split, counters))
            return http(200, "\n".join(["# HELP x", *grown, ""]).encode())
        assert path == "/v1/classify?top_k=1"
        self.requests.append((body, headers))
        await asyncio.sleep(self.delay_s)
        status, content = self.answers(body, headers)
        return http(status, json.dumps(content).encode())


def http(status: int, body: bytes) -> bytes:
    return (
        f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )


@contextmanager
def serving(fake: FakeServer) -> Iterator[FakeServer]:
    loop, ready, done = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(fake.serve(ready, done),), daemon=True)
    thread.start()
    assert ready.wait(5)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(5)
        loop.close()


def no_progress(num_sent: int, text: str) -> None:
    pass


def played(fake: FakeServer, workload: Workload, photos: Photos = PHOTOS) -> Records:
    async def main() -> Records:
        with closing(Client(fake.port)) as client:
            return await play(client, workload, photos, no_progress)

    with serving(fake):
        return run(main())


def records_of(
    status: Sequence[int],
    latency_ms: Sequence[float],
    budgets_ms: Sequence[float],
    correct: Sequence[int],
    width: Sequence[float],
    met: Sequence[int],
) -> Records:
    count = len(status)
    return Records(
        load_of([0.1 * (i + 1) for i in range(count)], budgets_ms),
        np.full(count, 0.0005),
        np.array(latency_ms) / 1000,
        np.array(status),
        np.array(width, float),
        np.array(correct, bool),
        np.array(met, bool),
    )


NAN = math.nan
HAND_MADE = records_of(
    #            right  late  wrong  shed  impossible  expired  lost  right
    status=[200, 200, 200, 429, 422, 504, 0, 200],
    latency_ms=[50, 120, 60, 3, 2, 105, NAN, 90],
    budgets_ms=[100, 100, 100, 100, 100, 100, 100, 90],
    correct=[1, 1, 0, 0, 0, 0, 0, 1],
    width=[1.0, 0.5, 0.5, NAN, NAN, NAN, NAN, 1.0],
    met=[1, 1, 1, 0, 0, 0, 0, 1],
)
