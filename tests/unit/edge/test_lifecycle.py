"""Starting, leaving and failing, as the caller sees it."""

from __future__ import annotations

import asyncio
import logging
import math
from unittest import mock

import pytest

from scala_model.checkpoint import Checkpoint
from scala_model.width import Width
from server.app import assemble
from server.edge import LINGER_S
from server.settings import Settings
from tests.unit.edge.application import (
    IMAGE,
    QuietMachine,
    Runner,
    Site,
    check_problem,
    client,
    form,
    lifespan,
    statuses,
)
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


def test_who_was_let_in_before_the_end_is_served_even_if_the_rest_of_it_comes_later(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        lifecycle = site.services.lifecycle
        slow = asyncio.create_task(site.classify(receive=client((0.1, IMAGE[:30]), (0.5, IMAGE[30:]))))
        await asyncio.sleep(0.2)
        lifecycle.draining = lifecycle.refusing = True
        check_problem(await site.classify(), 503)
        assert (await slow).status == 200

    site(scenario)


@pytest.mark.parametrize(("pause_s", "lasts_s"), [(1.0, 2.0), (math.inf, LINGER_S)])
def test_a_refusal_waits_for_the_rest_of_an_upload_but_not_forever(
    site: Runner, pause_s: float, lasts_s: float
) -> None:
    """The answer itself goes out, and counts, at once; the connection closes, and the server leaves, later."""

    async def scenario(site: Site) -> None:
        site.services.lifecycle.draining = True
        reply = await site.classify(
            headers={"X-Latency-Budget-Ms": "0.001"}, receive=client((pause_s, IMAGE[:30]), (pause_s, IMAGE[30:]))
        )
        check_problem(reply, 422)
        assert reply.seconds == pytest.approx(lasts_s)
        assert await site.metric("scala_request_duration_seconds_count") == 1
        assert await site.metric("scala_request_duration_seconds_sum") == pytest.approx(0)
        assert site.services.lifecycle.in_flight == 0

    site(scenario)


@pytest.mark.parametrize("failed", [False, True])
def test_who_has_no_answer_when_the_server_must_leave_is_told_so(site: Runner, failed: bool) -> None:
    """Whoever still uploads, in every form, and whoever waits for the engine."""

    async def scenario(site: Site) -> None:
        site.engine.seconds = lambda width, images: 1.5
        lifecycle = site.services.lifecycle
        names = {"X-Latency-Budget-Ms": "60000"}
        uploading = [
            site.ask("POST", path, headers=names, receive=client((0.1, IMAGE[:30]), (math.inf, b"")))
            for path in ("/v1/classify", "/v2/models/toy/infer")
        ]
        asked = [asyncio.create_task(each) for each in (*uploading, site.classify(headers=names))]
        await asyncio.sleep(0.5)
        assert len(lifecycle.unanswered) == lifecycle.in_flight == 3
        lifecycle.draining, lifecycle.failed = not failed, "it hung" if failed else None
        lifecycle.dismiss_all()
        first, second, waiting = await asyncio.gather(*asked)
        for reply in (first, waiting):
            assert ("server failed" if failed else "draining") in check_problem(reply, 503)
        assert (second.status, list(second.json())) == (503, ["error"])
        assert {reply.headers["x-content-type-options"] for reply in (first, second, waiting)} == {"nosniff"}
        assert waiting.seconds == pytest.approx(0.5)
        assert (len(lifecycle.unanswered), lifecycle.in_flight, len(site.services.queue)) == (0, 0, 0)
        assert await site.metric('scala_requests_total{route="/v1/classify",status="503"}') == 2
        assert await site.metric('scala_requests_total{route="/v1/classify",status="0"}') == 0
        assert await site.metric('scala_budget_total{outcome="failed"}') == 3

    site(scenario)


def test_who_goes_on_uploading_behind_that_answer_is_cut_off_in_order(site: Runner) -> None:
    """The HTTP server cancels what is left in its last second."""

    async def scenario(site: Site) -> None:
        asked = asyncio.create_task(site.classify(receive=client((0.1, IMAGE[:30]), (math.inf, b""))))
        await asyncio.sleep(0.5)
        site.services.lifecycle.draining = True
        for _ in range(2):
            asked.cancel()
            await asyncio.sleep(0.5)
        reply = await asked
        check_problem(reply, 503)
        assert reply.seconds == pytest.approx(1.0)

    site(scenario)


def test_a_connection_that_goes_on_waits_for_nothing(site: Runner) -> None:
    """The HTTP server reads and drops the rest."""

    async def scenario(site: Site) -> None:
        headers = {"X-Latency-Budget-Ms": "0.001"}
        endless = client((1.0, IMAGE[:30]), (math.inf, b""))
        assert (await site.classify(headers=headers, receive=endless)).seconds == 0
        endless = client((1.0, IMAGE[:30]), (math.inf, b""))
        reply = await site.classify(headers={**headers, "Connection": "Close"}, receive=endless)
        assert reply.seconds == pytest.approx(LINGER_S)
        endless = client((1.0, IMAGE[:30]), (math.inf, b""))
        both = {**headers, "Connection": "keep-alive", "connection": "close"}  # as where it is we who want the end
        assert (await site.classify(headers=both, receive=endless)).seconds == pytest.approx(LINGER_S)

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
        assert await site.metric('scala_budget_total{outcome="failed"}') == 1
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
        assert "server failed" in check_problem(reply, 503)
        assert reply.headers["connection"] == "close"
        assert (await site.ask("GET", "/readyz")).status == 503
        assert (await site.ask("GET", "/livez")).status == 200
        assert (await site.ask("GET", "/v1/quote?budget_ms=20")).status == 503
        assert await site.metric('scala_budget_total{outcome="failed"}') == 10, "a quote is none"

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
            assert (ready.status, ready.body) == (503, b"the server failed, as its log tells")
            refused = await site.classify()
            check_problem(refused, 503)
            assert b"no such device" not in refused.body
            assert "no such device" in caplog.text

    run(scenario)


@pytest.mark.parametrize("trouble", [MemoryError(), OSError("no such file"), RuntimeError("nonsense")])
def test_a_machine_that_cannot_be_read_ends_no_server(
    site: Runner, trouble: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(site: Site) -> None:
        with mock.patch.object(QuietMachine, "sample", side_effect=trouble):
            await asyncio.sleep(1)
            assert (await site.classify()).status == 200
        await asyncio.sleep(1)
        assert site.services.lifecycle.failed is None

    with caplog.at_level(logging.INFO):
        site(scenario)
    told = [message for message in caplog.messages if "the machine's load" in message]
    assert [message.partition(":")[0] for message in told] == [
        "the machine's load cannot be read",
        "the machine's load can be read again",
    ]
