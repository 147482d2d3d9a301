"""The assembled application against the HTTP contract: hand-made ASGI, a fake engine, virtual time.

The fake engine takes 40 ms for one image at full width and 20 ms for each further one; other widths their share of it.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive

from scala_model.checkpoint import Checkpoint, read_checkpoint
from scala_model.width import Width
from server.app import assemble
from server.machine import MachineReader, MachineSample
from server.services import Services
from server.settings import Settings
from tests.unit.fake_engine import FakeEngine, usual_seconds
from tests.unit.toy import ACCURACIES, NUM_CLASSES, png, write_toy
from tests.unit.virtual_time import Clock, run

WIDE = Width(1.0)
CLASSIFY = "/v1/classify"
BODY_LIMIT, PIXEL_LIMIT = 100_000, 10_000
IMAGE = png(7)


# -- the application under test


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
    ) -> Reply:
        """One request. ``receive`` takes the place of a client that sends ``body`` and then stays."""
        started, sent = self.clock.now, list[Message]()

        async def send(message: Message) -> None:
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
            "server": ("127.0.0.1", 8000),
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return read_checkpoint(write_toy(tmp_path_factory.mktemp("checkpoints") / "toy"))


class Runner:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __call__(self, scenario: Callable[[Site], Awaitable[None]], *, warm: bool = True, **settings: object) -> None:
        """Run ``scenario`` on an application, by default once all is warmed."""

        async def whole(clock: Clock) -> None:
            engine = FakeEngine(clock, num_classes=NUM_CLASSES)
            given = {"max_body_bytes": BODY_LIMIT, "max_pixels": PIXEL_LIMIT, **settings}
            app, services = assemble(Settings.model_validate(given), self.checkpoint, engine, QuietMachine())
            async with lifespan(app):
                while warm and not all(services.profile.max_batch(w) == 4 for w in services.profile.widths):
                    await asyncio.sleep(1)
                await scenario(Site(app, services, engine, clock))

        run(whole)


@pytest.fixture
def site(checkpoint: Checkpoint) -> Runner:
    return Runner(checkpoint)


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


# -- answers


def test_one_image(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        reply = await site.classify(IMAGE, {"Content-Type": "image/png", "X-Latency-Budget-Ms": "100"})
        assert reply.status == 200
        answer, headers = reply.json(), reply.headers
        assert answer.keys() == {
            "model",
            "predictions",
            "width",
            "expected_accuracy",
            "budget_ms",
            "budget_met",
            "timing_ms",
            "batch_size",
            "request_id",
        }
        assert (answer["model"], answer["width"], answer["expected_accuracy"]) == ("toy", 1.0, 0.7)
        assert (answer["budget_ms"], answer["budget_met"], answer["batch_size"]) == (100, True, 1)
        first, *others = answer["predictions"]
        assert first == {"class_id": 7, "label": "class 7", "score": pytest.approx(0.9)}
        assert len(others) == 4
        assert answer["timing_ms"] == {
            "decode": 0,
            "queue": 0,
            "inference": pytest.approx(40, abs=0.01),
            "total": pytest.approx(40, abs=0.01),
        }
        assert headers["content-type"] == "application/json"
        assert (headers["x-scala-width"], headers["x-budget-met"]) == ("1", "true")
        assert headers["x-request-id"] == answer["request_id"]
        timing = dict(stage.split(";dur=") for stage in headers["server-timing"].split(", "))
        assert {stage: float(ms) for stage, ms in timing.items()} == answer["timing_ms"]

    site(scenario)


def test_several_images_have_each_their_own_answer_or_error(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        body, headers = form(png(3), IMAGE[:40], b"no image at all", png(5))
        reply = await site.classify(body, headers | {"X-Latency-Budget-Ms": "500"}, "?top_k=2")
        assert reply.status == 200
        answer = reply.json()
        assert answer.keys() == {"model", "results", "budget_ms", "budget_met", "request_id"}
        good, broken, nothing, other = answer["results"]
        assert [entry["predictions"][0]["class_id"] for entry in (good, other)] == [3, 5]
        assert good.keys() == {"predictions", "width", "expected_accuracy", "batch_size", "timing_ms"}
        assert (good["width"], good["batch_size"], len(good["predictions"])) == (1.0, 2, 2)
        assert [entry["error"]["status"] for entry in (broken, nothing)] == [422, 415]
        assert broken["error"]["request_id"] == answer["request_id"] == reply.headers["x-request-id"]
        assert (reply.headers["x-scala-width"], reply.headers["x-budget-met"]) == ("1", "true")
        assert "total;dur=" in reply.headers["server-timing"]

    site(scenario)


def test_several_images_of_which_none_is_answered_have_met_nothing(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        body, headers = form(IMAGE[:40], IMAGE[:30])
        reply = await site.classify(body, headers)
        assert [entry["error"]["status"] for entry in reply.json()["results"]] == [422, 422]
        assert await site.metric("scala_budget_total") == 0

    site(scenario)


def test_a_form_of_one_file_is_answered_like_one_image(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        body, headers = form(png(9))
        reply = await site.classify(body, headers)
        assert (reply.status, reply.json()["predictions"][0]["class_id"]) == (200, 9)

    site(scenario)


@pytest.mark.parametrize(
    "content_type", [None, "image/png", "IMAGE/PNG; x=y", "image/jpeg", "application/octet-stream"]
)
def test_an_image_of_any_declared_image_type_is_read_for_what_it_is(site: Runner, content_type: str | None) -> None:
    async def scenario(site: Site) -> None:
        reply = await site.classify(IMAGE, {"Content-Type": content_type} if content_type else {})
        assert reply.status == 200

    site(scenario)


def test_the_budget_buys_the_width(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for budget_ms, width in ((41, 1.0), (39, 0.75), (29, 0.5), (19, 0.25), (10.5, 0.25)):
            answer = (await site.classify(headers={"X-Latency-Budget-Ms": str(budget_ms)})).json()
            assert (answer["width"], answer["budget_met"]) == (width, True)
            assert answer["expected_accuracy"] == ACCURACIES[width]

    site(scenario)


def test_pins_and_floors(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for headers, width in (
            ({"X-Width": "0.5"}, 0.5),
            ({"X-Min-Accuracy": "0.5", "X-Latency-Budget-Ms": "25"}, 0.5),
            ({"X-Min-Accuracy": "0"}, 1.0),
            ({"X-Min-Accuracy": "0.7"}, 1.0),
            ({"X-Width": "0.75", "X-Min-Accuracy": "0.6"}, 0.75),
        ):
            assert (await site.classify(headers=headers)).json()["width"] == width

    site(scenario)


@pytest.mark.parametrize(("query", "count"), [("?top_k=1", 1), ("?top_k=200", 200), ("", 5)])
def test_top_k(site: Runner, query: str, count: int) -> None:
    async def scenario(site: Site) -> None:
        predictions = (await site.classify(query=query)).json()["predictions"]
        assert len({entry["class_id"] for entry in predictions}) == count
        scores = [entry["score"] for entry in predictions]
        assert scores == sorted(scores, reverse=True)

    site(scenario)


def test_who_names_no_budget_has_the_default_one_and_may_be_late(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        site.engine.seconds = lambda width, images: 0.5
        reply = await site.classify()
        assert (reply.status, reply.json()["budget_ms"], reply.json()["budget_met"]) == (200, 100, False)
        assert reply.headers["x-budget-met"] == "false"
        assert await site.metric('scala_budget_total{outcome="missed"}') == 1

    site(scenario, default_budget_ms=100)


# -- the caller's mistakes

BAD_HEADERS = [
    *(
        ("X-Latency-Budget-Ms", value)
        for value in ("abc", "", "-5", "0", "-0", "nan", "inf", "-inf", "1e9", "600000.1", "1_000", "0x10", "1e999")
    ),
    *(("X-Min-Accuracy", value) for value in ("1.5", "-0.1", "high", "nan", "55%")),
    *(("X-Width", value) for value in ("wide", "nan", "inf", "")),
]
BAD_QUERIES = [
    "top_k=0",
    "top_k=201",
    "top_k=abc",
    "top_k=-1",
    "top_k=",
    "top_k=1.0",
    "top_k=%C2%B2",
    "topk=3",
    "top_k=1&x=2",
]


def test_a_header_that_makes_no_sense_is_named_with_its_value(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for name, value in BAD_HEADERS:
            detail = check_problem(await site.classify(headers={name: value}), 400)
            assert name in detail, (name, value)
        assert site.engine.served == []

    site(scenario)


def test_a_query_that_makes_no_sense_is_refused(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for query in (*BAD_QUERIES, "top_k=000000001" + "9" * 5000, "top_k=" + "9" * 5000):
            assert "top_k" in check_problem(await site.classify(query=f"?{query}"), 400), query

    site(scenario)


def test_a_body_that_makes_no_sense_is_refused(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        boundary = {"Content-Type": "multipart/form-data; boundary=x"}
        for body, headers in (
            (b"", {}),
            (b"", boundary),
            (b"no form", {"Content-Type": "multipart/form-data"}),
            (b"no form", boundary),
            (b"--x--\r\n", boundary),
            form(IMAGE, name="picture"),
            (b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\ntext\r\n--x--\r\n', boundary),
            form(b""),
        ):
            check_problem(await site.classify(body, headers), 400)

    site(scenario)


def test_too_many_bytes_are_refused_by_their_declared_size_before_one_is_read(site: Runner) -> None:
    async def never() -> Message:
        raise AssertionError("read")

    async def scenario(site: Site) -> None:
        reply = await site.classify(headers={"Content-Length": str(BODY_LIMIT + 1)}, receive=never)
        assert str(BODY_LIMIT) in check_problem(reply, 413)

    site(scenario)


def test_too_many_bytes_are_refused_when_they_come_undeclared(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        endless = client(*[(0.0, bytes(BODY_LIMIT // 10))] * 1000)
        check_problem(await site.classify(receive=endless), 413)
        assert site.services.admission.inflight_bytes == 0
        assert await endless() != {"type": "http.disconnect"}, "the rest is not read"

    site(scenario)


def test_too_many_pixels_are_refused(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        assert (await site.classify(png(1, (100, 100)))).status == 200
        assert str(PIXEL_LIMIT) in check_problem(await site.classify(png(1, (101, 100))), 413)

    site(scenario)


def test_more_images_than_the_queue_holds_are_refused_for_good(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        body, headers = form(*[IMAGE] * 3)
        assert (await site.classify(body, headers)).status == 200
        body, headers = form(*[IMAGE] * 4)
        assert "fewer" in check_problem(await site.classify(body, headers), 413)
        assert site.services.admission.images == 0

    site(scenario, max_queue=3)


def test_what_is_no_image_is_refused(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for body, declared in ((IMAGE, "text/plain"), (IMAGE, "application/pdf"), (b"%PDF-1.7 ...", "image/png")):
            check_problem(await site.classify(body, {"Content-Type": declared}), 415)
        body, headers = form(IMAGE, content_type="text/plain")
        check_problem(await site.classify(body, headers), 415)

    site(scenario)


def test_a_broken_image_is_refused(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        check_problem(await site.classify(IMAGE[:40]), 422)

    site(scenario)


def test_the_impossible_is_refused_with_what_is_possible(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for headers in ({"X-Latency-Budget-Ms": "9"}, {"X-Min-Accuracy": "0.71"}):
            reply = await site.classify(headers=headers)
            check_problem(reply, 422)
            assert [offer["width"] for offer in reply.json()["widths"]] == [0.25, 0.5, 0.75, 1.0]
            assert [offer["accuracy"] for offer in reply.json()["widths"]] == [0.4, 0.5, 0.6, 0.7]
        check_problem(await site.classify(headers={"X-Latency-Budget-Ms": "25", "X-Width": "1"}), 422)
        for untrained in ("0.3", "2", "-1", "0"):
            reply = await site.classify(headers={"X-Width": untrained})
            assert "X-Width" in check_problem(reply, 422)
            assert [offer["width"] for offer in reply.json()["widths"]] == [0.25, 0.5, 0.75, 1.0]
        assert await site.metric('scala_budget_total{outcome="impossible"}') > 0
        assert site.engine.served == []

    site(scenario)


def test_where_nothing_is_and_how_not_to_ask(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        check_problem(await site.ask("GET", "/nowhere"), 404)
        reply = await site.ask("GET", CLASSIFY)
        check_problem(reply, 405)
        assert reply.headers["allow"] == "POST"
        check_problem(await site.ask("DELETE", "/readyz"), 405)

    site(scenario)


# -- load


def statuses(replies: Sequence[Reply]) -> dict[int, int]:
    found = [reply.status for reply in replies]
    return {status: found.count(status) for status in sorted(set(found))}


def test_a_burst_is_answered_in_time_or_refused_at_once(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        headers = {"X-Latency-Budget-Ms": "200"}
        replies = await asyncio.gather(*(site.classify(png(i + 1), headers) for i in range(100)))
        assert statuses(replies).keys() == {200, 429}
        assert sum(reply.status == 200 for reply in replies) >= 24, "200 ms of the narrowest width serve 31"
        for image, reply in enumerate(replies, 1):
            if reply.status == 200:
                assert reply.json()["budget_met"]
                assert reply.json()["predictions"][0]["class_id"] == image
                assert reply.seconds <= 0.2
            else:
                check_problem(reply, 429)
                assert reply.headers["retry-after"].isdecimal()
                assert 1 <= int(reply.headers["retry-after"]) <= 3
        refused = [reply.seconds for reply in replies if reply.status == 429]
        assert sorted(refused)[len(refused) // 2] == 0, "most know at once"
        assert await site.metric('scala_budget_total{outcome="shed"}') == len(refused)
        assert site.services.admission.images == 0

    site(scenario)


def test_a_full_queue_refuses(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        replies = await asyncio.gather(*(site.classify() for _ in range(10)))
        assert statuses(replies) == {200: 3, 429: 7}

    site(scenario, max_queue=3)


def test_a_deadline_ends_a_request_at_its_instant_whatever_the_engine_does(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        site.engine.seconds = lambda width, images: 1.5
        requests = [site.classify(headers={"X-Latency-Budget-Ms": str(ms)}) for ms in (300, 50, 110.5)]
        for ms, reply in zip((300, 50, 110.5), await asyncio.gather(*requests), strict=True):
            check_problem(reply, 504)
            assert reply.seconds == pytest.approx(ms / 1000, abs=1e-6)
        assert await site.metric('scala_budget_total{outcome="expired"}') == 3
        assert site.services.admission.images == 0

    site(scenario)


def test_the_deadline_of_who_names_no_budget_is_ten_default_ones(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        site.engine.seconds = lambda width, images: 1.9
        reply = await site.classify()
        check_problem(reply, 504)
        assert reply.seconds == pytest.approx(1.0)

    site(scenario, default_budget_ms=100)


def test_uploading_takes_of_the_budget(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        headers = {"X-Latency-Budget-Ms": "200"}
        slow = client((0.1, IMAGE[:30]), (0.05, IMAGE[30:]))
        reply = await site.classify(headers=headers, receive=slow)
        assert (reply.status, reply.json()["width"], reply.json()["timing_ms"]["total"]) == (
            200,
            1.0,
            pytest.approx(190),
        )
        never = client((0.1, IMAGE[:30]), (math.inf, b""))
        reply = await site.classify(headers=headers, receive=never)
        check_problem(reply, 504)
        assert reply.seconds == pytest.approx(0.2)
        assert site.services.admission.inflight_bytes == 0

    site(scenario)


def test_a_client_that_leaves_before_its_batch_is_never_computed(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        others = [asyncio.create_task(site.classify(png(i))) for i in (1, 2, 3, 4)]
        await asyncio.sleep(0.010)
        gone = await site.classify(receive=client((0.0, png(99)), leaves_after=0.020))
        assert gone.seconds == pytest.approx(0.020)
        assert len(site.services.queue) == 0
        assert statuses(await asyncio.gather(*others)) == {200: 4}
        assert (await site.classify(png(5))).status == 200
        assert 99 not in [image for _, images in site.engine.served for image in images]
        assert await site.metric("scala_cancelled_before_dispatch_total") == 1
        assert await site.metric('scala_budget_total{outcome="cancelled"}') == 1
        assert site.services.admission.images == 0

    site(scenario)


def test_a_client_that_leaves_during_its_batch_harms_nobody(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        gone = asyncio.create_task(site.classify(receive=client((0.0, png(99)), leaves_after=0.010)))
        other = await site.classify(png(4))
        assert (other.status, other.json()["predictions"][0]["class_id"]) == (200, 4)
        await gone
        assert await site.metric("scala_cancelled_before_dispatch_total") == 0
        assert await site.metric('scala_budget_total{outcome="cancelled"}') == 1

    site(scenario)


def test_a_client_that_leaves_during_its_upload_leaves_nothing_behind(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        messages: list[Message] = [
            {"type": "http.request", "body": IMAGE[:20], "more_body": True},
            {"type": "http.disconnect"},
        ]

        async def receive() -> Message:
            return messages.pop(0)

        await site.classify(receive=receive)
        assert (site.services.admission.images, site.services.admission.inflight_bytes) == (0, 0)
        assert site.engine.served == []
        assert await site.metric('scala_budget_total{outcome="cancelled"}') == 1

    site(scenario)


# -- names


def test_a_request_id_comes_back(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for given in ("abc-123", "x" * 128, "a b/c=d"):
            reply = await site.classify(headers={"X-Request-Id": given})
            assert reply.headers["x-request-id"] == reply.json()["request_id"] == given
        reply = await site.ask("GET", "/nowhere", headers={"X-Request-Id": "abc"})
        assert reply.headers["x-request-id"] == reply.json()["request_id"] == "abc"

    site(scenario)


def test_a_silly_request_id_is_replaced(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        made = set()
        for given in ("", "x" * 129, "x" * 1000, "a\nb", "a\r\nSet-Cookie: x", "\x00", "\x7f", "caf\xe9"):
            reply = await site.classify(headers={"X-Request-Id": given})
            assert reply.status == 200
            made.add(reply.headers["x-request-id"])
        assert len(made) == 8
        assert all(len(name) == 32 and name.isalnum() for name in made)

    site(scenario)


# -- starting, leaving, failing


def test_until_the_first_widths_are_warmed_nothing_is_served(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        ready = await site.ask("GET", "/readyz")
        assert (ready.status, ready.body.startswith(b"starting")) == (503, True)
        assert (await site.ask("GET", "/livez")).status == 200
        reply = await site.classify()
        assert "starting" in check_problem(reply, 503)
        assert int(reply.headers["retry-after"]) >= 1
        while not site.services.lifecycle.started:
            await asyncio.sleep(0.1)
        assert (await site.ask("GET", "/readyz")).status == 200
        replies = await asyncio.gather(*(site.classify(png(i)) for i in (1, 2, 3)))
        assert statuses(replies) == {200: 3}, "the rest is still being calibrated"
        check_problem(await site.classify(headers={"X-Width": "0.5"}), 503)

    site(scenario, warm=False)


def test_a_draining_server_serves_on_and_then_refuses(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        lifecycle = site.services.lifecycle
        lifecycle.draining = True
        assert (await site.ask("GET", "/readyz")).status == 503
        reply = await site.classify()
        assert (reply.status, reply.headers["connection"]) == (200, "close"), "the next one goes elsewhere"
        running = asyncio.create_task(site.classify())
        await asyncio.sleep(0.010)
        assert lifecycle.in_flight == 1
        lifecycle.refusing = True
        reply = await site.classify()
        assert "draining" in check_problem(reply, 503)
        assert reply.headers["connection"] == "close"
        assert (await site.ask("GET", "/livez")).status == 200
        assert (await running).status == 200, "who was let in is answered"
        assert lifecycle.in_flight == 0

    site(scenario)


def test_an_error_of_the_engine_shows_nothing_of_itself(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        def seconds(width: Width, images: list[int]) -> float:
            if 99 in images:
                raise RuntimeError("secret")
            return usual_seconds(width, images)

        site.engine.seconds = seconds
        reply = await site.classify(png(99))
        check_problem(reply, 500)
        assert b"secret" not in reply.body
        body, headers = form(png(99), IMAGE[:40])
        several = await site.classify(body, headers)
        assert [entry["error"]["status"] for entry in several.json()["results"]] == [500, 422]
        assert b"secret" not in several.body
        assert (await site.classify()).status == 200
        assert await site.metric('scala_requests_total{route="/v1/classify",status="500"}') == 1
        assert (site.services.admission.images, site.services.lifecycle.in_flight) == (0, 0)

    site(scenario)


def test_a_hung_engine_ends_in_503_for_everyone(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        site.engine.seconds = lambda width, images: math.inf
        headers = {"X-Latency-Budget-Ms": "60000"}
        replies = await asyncio.gather(*(site.classify(headers=headers) for _ in range(9)))
        for reply in replies:
            check_problem(reply, 503)
            assert reply.seconds == pytest.approx(2)
        reply = await site.classify()
        assert "engine failed" in check_problem(reply, 503)
        assert reply.headers["connection"] == "close"
        assert (await site.ask("GET", "/readyz")).status == 503
        assert (await site.ask("GET", "/livez")).status == 200

    site(scenario)


def test_an_engine_that_cannot_be_loaded_is_told_to_whoever_asks(checkpoint: Checkpoint) -> None:
    class Unloadable(FakeEngine):
        def load(self, width: Width, batch: int) -> None:
            raise OSError("no such device")

    async def scenario(clock: Clock) -> None:
        app, services = assemble(Settings(), checkpoint, Unloadable(clock), QuietMachine())
        async with lifespan(app):
            site = Site(app, services, Unloadable(clock), clock)
            await asyncio.sleep(0.1)
            ready = await site.ask("GET", "/readyz")
            assert (ready.status, b"no such device" in ready.body) == (503, True)
            check_problem(await site.classify(), 503)

    run(scenario)


# -- what is told about it all

METRICS = {
    "scala_requests_total",
    "scala_request_duration_seconds_count",
    "scala_stage_duration_seconds_count",
    "scala_budget_total",
    "scala_width_selected_total",
    "scala_batch_size_count",
    "scala_queue_depth",
    "scala_inflight_bytes",
    "scala_prediction_error_ratio",
    "scala_interference_ratio",
    "scala_expected_accuracy_ratio",
    "scala_accuracy_debt_points",
    "scala_engine_busy_ratio",
    "scala_event_loop_lag_seconds",
    "scala_cpu_load_ratio",
    "scala_cpu_throttled_ratio",
    "scala_memory_bytes",
    "scala_gpu_memory_bytes",
    "scala_cancelled_before_dispatch_total",
    "scala_model_info",
    "scala_build_info",
    "scala_full_width_demand_ratio",
}


def test_every_metric_of_the_contract_is_there(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        await site.classify()
        text = (await site.ask("GET", "/metrics")).body.decode()
        names = {line.partition("{")[0].partition(" ")[0] for line in text.splitlines()}
        assert names >= METRICS
        for outcome in ("met", "missed", "shed", "impossible", "expired", "cancelled"):
            assert f'scala_budget_total{{outcome="{outcome}"}}' in text
        for stage in ("decode", "queue", "inference"):
            assert f'scala_stage_duration_seconds_count{{stage="{stage}"}} 1.0' in text
        assert 'scala_model_info{name="toy",sha256="' in text
        assert 'engine="fake"' in text

    site(scenario)


def test_requests_are_counted_by_route_status_width_and_outcome(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        await site.classify(headers={"X-Width": "0.5"})
        await site.classify(b"")
        for path in ("/a", "/b", "/v1/classify/x"):
            await site.ask("GET", path)
        await site.ask("GET", "/livez")
        assert await site.metric('scala_requests_total{route="/v1/classify",status="200"}') == 1
        assert await site.metric('scala_requests_total{route="/v1/classify",status="400"}') == 1
        assert await site.metric('scala_requests_total{route="none",status="404"}') == 3, "paths are no labels"
        assert await site.metric('scala_requests_total{route="/livez",status="200"}') == 1
        assert await site.metric('scala_request_duration_seconds_count{outcome="met",width="0.5"}') == 1
        assert await site.metric('scala_request_duration_seconds_sum{outcome="met",width="0.5"}') == pytest.approx(0.02)
        assert await site.metric('scala_budget_total{outcome="met"}') == 1
        assert await site.metric("scala_budget_total") == 1, "a malformed request has no budget"

    site(scenario)


def test_the_demand_at_full_width_counts_the_shed_and_not_the_impossible(site: Runner) -> None:
    async def demand(site: Site) -> float:
        return await site.metric("scala_full_width_demand_ratio")

    async def scenario(site: Site) -> None:
        budget = {"X-Latency-Budget-Ms": "150"}  # of half of it, 75 ms, two images at 30 ms each are the best batch
        assert await demand(site) == 0
        for impossible in (
            {"X-Latency-Budget-Ms": "9"},
            {"X-Width": "0.3"},
            {"X-Min-Accuracy": "0.9"},
            {"X-Width": "x"},
        ):
            await site.classify(headers=impossible)
        assert await demand(site) == 0
        replies = await asyncio.gather(*(site.classify(headers=budget) for _ in range(100)))
        assert statuses(replies)[429] > 50
        seconds = max(reply.seconds for reply in replies)
        assert await demand(site) == pytest.approx(100 / 15 * 0.030 * math.exp(-seconds / 15), rel=0.02)
        await asyncio.sleep(60)
        assert await demand(site) < 0.01

    site(scenario)


def test_a_pinned_width_demands_its_own_time(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        await site.classify(headers={"X-Width": "0.25", "X-Latency-Budget-Ms": "150"})
        assert await site.metric("scala_full_width_demand_ratio") == pytest.approx(0.25 / 15 * 0.030, rel=0.02)

    site(scenario)


def test_every_image_of_a_request_is_an_arrival(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        body, headers = form(*[png(1)] * 4)
        await site.classify(body, headers | {"X-Latency-Budget-Ms": "150"})
        assert await site.metric("scala_full_width_demand_ratio") == pytest.approx(4 / 15 * 0.030, rel=0.02)

    site(scenario)


def test_the_accuracy_that_load_costs_is_told(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        assert await site.metric("scala_accuracy_debt_points") == 0
        for _ in range(100):
            await site.classify(headers={"X-Latency-Budget-Ms": "25"})
        assert await site.metric("scala_expected_accuracy_ratio") == pytest.approx(0.5, abs=0.01)
        assert await site.metric("scala_accuracy_debt_points") == pytest.approx(20, abs=1)

    site(scenario)


def test_the_model_card_with_what_this_machine_makes_of_it(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        card = (await site.ask("GET", "/v1/model")).json()
        assert (card["name"], card["image_size"], len(card["classes"]), card["classes"][3]) == (
            "toy",
            8,
            200,
            "class 3",
        )
        narrow, *_, wide = card["widths"]
        assert wide["latency_ms"] == {
            "1": {"p50": pytest.approx(40), "p99": pytest.approx(40)},
            "2": {"p50": pytest.approx(60), "p99": pytest.approx(60)},
            "4": {"p50": pytest.approx(100), "p99": pytest.approx(100)},
        }
        assert (narrow["accuracy"], narrow["dominated"]) == (0.4, False)
        assert narrow["accuracy_ci95"] == pytest.approx([0.39, 0.41])
        assert wide["macs"] > narrow["macs"] > 0

    site(scenario)


def test_the_api_is_documented(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        document = (await site.ask("GET", "/openapi.json")).json()
        classify = document["paths"][CLASSIFY]["post"]
        assert {"200", "400", "413", "415", "422", "429", "503", "504"} <= classify["responses"].keys()
        named = {parameter["name"] for parameter in classify["parameters"]}
        assert {"top_k", "X-Latency-Budget-Ms", "X-Min-Accuracy", "X-Width", "X-Request-Id"} <= named
        assert (await site.ask("GET", "/docs")).status == 200

    site(scenario)


def test_a_policy_for_a_width_that_was_not_trained_is_refused_at_once(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="was not trained"):
        assemble(Settings(policy="fixed:0.3"), checkpoint, FakeEngine(Clock()), QuietMachine())


def test_the_toy_checkpoint_is_what_these_tests_believe(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert [float(width) for width in checkpoint.config.widths] == list(ACCURACIES)
    assert usual_seconds(WIDE, [0]) == 0.04
