"""``GET /v1/events``: what a listener is told, and when a stream ends."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from server.routes.events import MAX_LISTENERS
from tests.unit.edge.application import Reply, Runner, Site, check_problem, client

EVENTS = "/v1/events"


async def listen(site: Site, seconds: float) -> Reply:
    return await site.ask("GET", EVENTS, receive=client((0.0, b""), leaves_after=seconds))


def ticks_of(reply: Reply) -> list[dict[str, Any]]:
    assert reply.status == 200
    *events, rest = reply.body.decode().split("\n\n")
    assert rest == "", "each event is ended"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_listener_gets_the_last_two_minutes_and_then_a_tick_a_second(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        await asyncio.sleep(300)
        reply = await listen(site, 10.1)
        assert len(ticks_of(reply)) == 120 + 10
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-store"

    site(scenario)


def test_a_tick_tells_what_happened_since_the_last(site: Runner) -> None:
    """One image takes 20 ms at width 0.5 and 40 ms at full width."""

    async def scenario(site: Site) -> None:
        task = asyncio.create_task(listen(site, 20))
        await asyncio.sleep(0.05)
        for width in ("0.5", "0.5", "1"):
            assert (await site.classify(headers={"X-Width": width})).status == 200
        await site.classify(headers={"X-Latency-Budget-Ms": "2"})
        before, after = [], ticks_of(await task)
        while not after[0]["outcomes"]["met"]:
            before.append(after.pop(0))
        assert all(tick["latency_ms"] is tick["attainment"] is None for tick in before)
        assert all(tick["state"] == "ready" and tick["seconds"] == pytest.approx(1, abs=0.15) for tick in after)
        first, *others = after
        assert first["outcomes"] == {
            "met": 3,
            "impossible": 1,
            "missed": 0,
            "shed": 0,
            "expired": 0,
            "failed": 0,
            "cancelled": 0,
        }
        assert {width: count for width, count in first["widths"].items() if count} == {"0.5": 2, "1": 1}
        assert first["latency_ms"] == pytest.approx({"p50": 20, "p99": 20}, abs=1)
        assert first["attainment"] == 1
        assert not any(sum(tick["outcomes"].values()) or sum(tick["widths"].values()) for tick in others)
        assert [tick["attainment"] for tick in others].count(1) == 9, "it is of ten ticks"
        assert others[-1]["latency_ms"] is None

    site(scenario)


def test_lateness_and_refusals_lower_attainment(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        headers = {"X-Latency-Budget-Ms": "100"}
        replies = await asyncio.gather(*(site.classify(headers=headers) for _ in range(60)))
        met = sum(reply.status == 200 for reply in replies)
        assert 0 < met < 60
        tick = ticks_of(await listen(site, 1.5))[-1]
        assert tick["attainment"] == pytest.approx(met / 60, abs=1e-4)
        assert tick["full_width_demand_ratio"] == pytest.approx(
            await site.metric("scala_full_width_demand_ratio"), rel=0.1
        )

    site(scenario)


def test_all_listeners_are_told_the_same(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        await asyncio.sleep(3)
        one, other = await asyncio.gather(listen(site, 5.3), listen(site, 5.3))
        assert one.body == other.body
        assert site.services.pulse.listeners == 0, "who leaves is not counted any more"

    site(scenario)


def test_streams_end_when_the_server_begins_to_leave(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        lifecycle = site.services.lifecycle
        streams = [asyncio.create_task(site.ask("GET", EVENTS)) for _ in range(3)]
        await asyncio.sleep(5.1)
        assert lifecycle.in_flight == 3
        lifecycle.draining, left = True, site.clock.now
        replies = await asyncio.gather(*streams)
        assert site.clock.now - left <= 0.2
        assert lifecycle.in_flight == site.services.pulse.listeners == 0, "the server need not wait for them"
        assert all(ticks_of(reply)[-1]["state"] == "draining" for reply in replies)
        refused = await site.ask("GET", EVENTS)
        assert "draining" in check_problem(refused, 503)

    site(scenario)


def test_streams_end_when_the_engine_fails(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        stream = asyncio.create_task(site.ask("GET", EVENTS))
        await asyncio.sleep(1)
        site.services.lifecycle.fail("no device")
        assert ticks_of(await stream)[-1]["state"] == "the server failed, as its log tells"

    site(scenario)


def test_only_so_many_may_listen(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        streams = [asyncio.create_task(listen(site, 10 + i)) for i in range(MAX_LISTENERS)]
        await asyncio.sleep(1)
        refused = await site.ask("GET", EVENTS)
        assert f"{MAX_LISTENERS} clients" in check_problem(refused, 503)
        assert refused.headers["retry-after"] == "1"
        await streams[0]
        assert (await listen(site, 1)).status == 200
        await asyncio.gather(*streams)
        assert await site.metric("scala_budget_total") == 0, "nobody's budget was refused"

    site(scenario)


def test_starting_is_told_too(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        site.engine.seconds = lambda width, images: 2.0
        tick, *_ = ticks_of(await listen(site, 1.5))
        assert tick["state"].startswith("starting")

    site(scenario, warm=False)


def test_numbers_that_cannot_be_told_end_no_server(site: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(site: Site) -> None:
        with monkeypatch.context() as broken:
            broken.setattr(site.services.pulse, "_tick", lambda *given: 1 / 0)
            assert ticks_of(await listen(site, 3)), "those from before"
            assert (await site.classify()).status == 200
            assert site.services.lifecycle.failed is None
            stream = asyncio.create_task(site.ask("GET", EVENTS))
            await asyncio.sleep(1)
            site.services.lifecycle.draining = True
            await asyncio.wait_for(stream, 1)

    site(scenario)


def test_events_are_documented(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        told = (await site.ask("GET", "/openapi.json")).json()["paths"][EVENTS]["get"]
        assert told["responses"]["200"]["content"].keys() == {"text/event-stream"}
        assert "503" in told["responses"]

    site(scenario)
