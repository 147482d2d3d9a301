"""The assembled application under test: hand-made ASGI, a fake engine, virtual time.

The fake engine takes 40 ms for one image at full width and 20 ms for each further one; other widths their share of it.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

from starlette.types import ASGIApp, Message, Receive

from scala_model.checkpoint import Checkpoint
from scala_model.width import Width
from server.app import assemble
from server.machine import MachineReader, MachineSample
from server.planner import PlanInputs
from server.policies.plan import Plan
from server.services import Services
from server.settings import Settings
from server.spans import Tracer
from tests.unit.fake_engine import FakeEngine
from tests.unit.toy import NUM_CLASSES, png
from tests.unit.virtual_time import Clock, run

WIDE = Width(1.0)
CLASSIFY = "/v1/classify"
BODY_LIMIT, PIXEL_LIMIT = 100_000, 10_000
IMAGE = png(7)
made = cache(PlanInputs.make)


async def made_beside(inputs: PlanInputs) -> Plan:
    return made(inputs)


class QuietMachine(MachineReader):
    """A machine with two cores on which nothing else runs."""

    def __init__(self) -> None:
        self.cpus, self.host_cpus = 2.0, 2

    def sample(self) -> MachineSample:
        return MachineSample(cpu_load=0.1, others_cores=0.0, throttled=0.0, memory_bytes=1000)


@dataclass(frozen=True)
class Reply:
    """``seconds`` from the request's head to the answer's last byte."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Site:
    """The application, and how to talk to it."""

    app: ASGIApp
    services: Services
    engine: FakeEngine
    clock: Clock

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
        *,
        receive: Receive | None = None,
        port: int = 8000,
        reads_after: float = 0.0,
    ) -> Reply:
        """One request, at ``port``. ``receive`` takes the place of a client that sends ``body`` and then stays;
        ``reads_after``: seconds in which nothing of the answer can be sent."""
        started, sent = self.clock.now, list[Message]()

        async def send(message: Message) -> None:
            if reads_after and not sent:
                await asyncio.sleep(reads_after)
            sent.append(message)

        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", port),
        }
        await self.app(scope, receive or client((0.0, body)), send)
        start, *rest = sent
        assert start["type"] == "http.response.start"
        return Reply(
            start["status"],
            {name.decode(): value.decode() for name, value in start["headers"]},
            b"".join(message["body"] for message in rest),
            self.clock.now - started,
        )

    async def classify(
        self, body: bytes = IMAGE, headers: Mapping[str, str] = {}, query: str = "", receive: Receive | None = None
    ) -> Reply:
        return await self.ask("POST", CLASSIFY + query, body, headers, receive=receive)

    async def metric(self, name: str) -> float:
        """The sum of a metric over its labels; ``name`` may hold some, written as in the text format."""
        text = (await self.ask("GET", "/metrics")).body.decode()
        values = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(map(float, values))


def client(*pieces: tuple[float, bytes], leaves_after: float = math.inf) -> Receive:
    """A client that sends each piece of its body after so many seconds, and leaves that long after the last."""
    messages = iter(
        [
            (pause, {"type": "http.request", "body": piece, "more_body": number < len(pieces)})
            for number, (pause, piece) in enumerate(pieces, 1)
        ]
    )

    async def receive() -> Message:
        pause, message = next(messages, (leaves_after, {"type": "http.disconnect"}))
        if pause == math.inf:
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(pause)
        return message

    return receive


@asynccontextmanager
async def lifespan(app: ASGIApp) -> AsyncIterator[None]:
    to_app, from_app = asyncio.Queue[Message](), asyncio.Queue[Message]()
    to_app.put_nowait({"type": "lifespan.startup"})
    task = asyncio.ensure_future(app({"type": "lifespan", "asgi": {"version": "3.0"}}, to_app.get, _put(from_app)))
    assert (await from_app.get())["type"] == "lifespan.startup.complete"
    yield
    to_app.put_nowait({"type": "lifespan.shutdown"})
    await task


def _put(queue: asyncio.Queue[Message]) -> Callable[[Message], Awaitable[None]]:
    return queue.put


class Runner:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __call__(
        self,
        scenario: Callable[[Site], Awaitable[None]],
        *,
        warm: bool = True,
        tracer: Tracer | None = None,
        **settings: object,
    ) -> None:
        """Run ``scenario`` on an application, by default once all is warmed."""

        async def whole(clock: Clock) -> None:
            engine = FakeEngine(clock, num_classes=NUM_CLASSES)
            given = {"max_body_bytes": BODY_LIMIT, "max_pixels": PIXEL_LIMIT, **settings}
            machine = QuietMachine()
            app, services = assemble(Settings.model_validate(given), self.checkpoint, engine, machine, tracer)
            async with lifespan(app):
                while warm and not all(services.profile.max_batch(w) == 4 for w in services.profile.widths):
                    await asyncio.sleep(1)
                await scenario(Site(app, services, engine, clock))

        # No process runs in virtual time; and all these servers plan for the same few inputs.
        with mock.patch.object(PlanInputs, "make", made), mock.patch.object(PlanInputs, "make_beside", made_beside):
            run(whole)


def form(*files: bytes, name: str = "file", content_type: str = "image/png") -> tuple[bytes, dict[str, str]]:
    """Body and headers of a multipart form."""
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="{i}"\r\n'
        f"Content-Type: {content_type}\r\n\r\n".encode()
        + file
        + b"\r\n"
        for i, file in enumerate(files)
    ]
    return b"".join(parts) + b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


def check_problem(reply: Reply, status: int) -> str:
    """The detail of a reply that must be a problem of this status, complete as RFC 9457 and the contract want it."""
    problem = reply.json()
    assert reply.status == status, problem
    assert reply.headers["content-type"] == "application/problem+json"
    assert {"type", "title", "status", "detail", "request_id"} <= problem.keys()
    assert problem["status"] == status
    assert problem["type"].startswith("urn:scala-serve:problem:")
    assert problem["request_id"] == reply.headers["x-request-id"]
    assert problem["title"]
    detail: str = problem["detail"]
    assert detail.endswith(".")
    return detail


def statuses(replies: Sequence[Reply]) -> dict[int, int]:
    found = [reply.status for reply in replies]
    return {status: found.count(status) for status in sorted(set(found))}
