"""Starting, leaving and failing, as the caller sees it."""

from __future__ import annotations

import asyncio
import math

import pytest

from scala_model.checkpoint import Checkpoint
from scala_model.width import Width
from server.app import assemble
from server.settings import Settings
from tests.unit.edge.application import IMAGE, QuietMachine, Runner, Site, check_problem, form, lifespan, statuses
from tests.unit.fake_engine import FakeEngine, usual_seconds
from tests.unit.toy import png
from tests.unit.virtual_time import Clock, run


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


def test_an_engine_that_cannot_be_loaded_is_told_to_whoever_asks_and_why_to_the_log(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    class Unloadable(FakeEngine):
        def load(self, width: Width, batch: int) -> None:
            raise OSError("no such device")

    async def scenario(clock: Clock) -> None:
        app, services = assemble(Settings(), checkpoint, Unloadable(clock), QuietMachine())
        async with lifespan(app):
            site = Site(app, services, Unloadable(clock), clock)
            await asyncio.sleep(0.1)
            ready = await site.ask("GET", "/readyz")
            assert (ready.status, ready.body) == (503, b"the engine failed, as its log tells")
            refused = await site.classify()
            check_problem(refused, 503)
            assert b"no such device" not in refused.body
            assert "no such device" in caplog.text

    run(scenario)
