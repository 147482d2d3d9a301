"""The application under load: in time, refused at once, or ended at the deadline."""

from __future__ import annotations

import asyncio
import math

import pytest
from starlette.types import Message

from tests.unit.edge.application import BODY_LIMIT, CLASSIFY, IMAGE, Runner, Site, check_problem, client, statuses
from tests.unit.toy import png


def test_a_burst_is_answered_in_time_or_refused_at_once(site: Runner) -> None:
    """Refused with 429 and a time to come back: of a server that says 503 a proxy thinks that it is sick."""

    async def scenario(site: Site) -> None:
        headers = {"X-Latency-Budget-Ms": "203"}
        replies = await asyncio.gather(*(site.classify(png(i + 1), headers) for i in range(100)))
        assert statuses(replies).keys() == {200, 429}
        assert sum(reply.status == 200 for reply in replies) >= 24, "203 ms of the narrowest width serve 32"
        for image, reply in enumerate(replies, 1):
            if reply.status == 200:
                assert reply.json()["budget_met"]
                assert reply.json()["predictions"][0]["class_id"] == image
                assert reply.seconds <= 0.203
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
    """There is one queue and it is bounded: nobody waits anywhere else to get into it."""

    async def scenario(site: Site) -> None:
        replies = await asyncio.gather(*(site.classify() for _ in range(10)))
        assert statuses(replies) == {200: 3, 429: 7}
        for reply in replies:
            assert reply.status == 200 or "SCALA_MAX_QUEUE is 3 images" in check_problem(reply, 429)

    site(scenario, max_queue=3)


def test_a_deadline_ends_a_request_at_its_instant_whatever_the_engine_does(site: Runner) -> None:
    """A budget that ends while the device is busy is answered in time, not when the device is free again."""

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
    """The deadline is one instant, computed when the head came in: no later step gets the whole budget again."""

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
        assert site.services.monitor.late.value(site.clock.now) == 0
        reply = await site.classify(headers=headers, receive=never)
        check_problem(reply, 504)
        assert reply.seconds == pytest.approx(0.2)
        assert site.services.monitor.late.value(site.clock.now) == 0, "the caller's fault, not the plan's"
        assert site.services.admission.inflight_bytes == 0

    site(scenario)


def test_a_client_that_leaves_before_its_batch_is_never_computed(site: Runner) -> None:
    """That it left is noticed through all of the application's middleware, its work is dropped before a batch takes it,
    and a counter proves it."""

    async def scenario(site: Site) -> None:
        others = [asyncio.create_task(site.classify(png(i))) for i in (1, 2, 3, 4)]
        await asyncio.sleep(0.010)
        gone = await site.classify(receive=client((0.0, png(99)), leaves_after=0.020))
        assert gone.seconds == pytest.approx(0.020)
        assert len(site.services.queue) < len(others)
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


def test_uploads_that_never_end_shut_nobody_out(site: Runner) -> None:
    """Small images are let in at once, and large ones as soon as a second is over."""

    async def scenario(site: Site) -> None:
        patient, large = {"X-Latency-Budget-Ms": "600000"}, bytes(BODY_LIMIT - 1)
        stalled = [
            asyncio.create_task(site.classify(headers=patient, receive=client((0.0, large), (math.inf, b""))))
            for _ in range(20)
        ]
        await asyncio.sleep(0.1)
        assert (await site.classify()).status == 200
        refused = await site.classify(large, headers=patient)
        assert f"more than {7 * BODY_LIMIT} bytes" in check_problem(refused, 429)
        await asyncio.sleep(1)
        assert (await site.classify(large, headers=patient)).status == 415, "it was looked at"
        told = [check_problem(task.result(), 429) for task in stalled if task.done()]
        assert len(told) == 14, "13 of them at once"
        assert sum("this one held most" in detail for detail in told) == 1
        for task in stalled:
            task.cancel()
        await asyncio.gather(*stalled, return_exceptions=True)
        assert site.services.admission.inflight_bytes == 0

    site(scenario)


def test_who_reads_slowly_has_nobody_refused(site: Runner) -> None:
    """How long an answer lies there for its client tells nothing of how long the next one takes."""

    async def scenario(site: Site) -> None:
        slow = await site.ask("POST", CLASSIFY, IMAGE, reads_after=10.0)
        assert (slow.status, slow.json()["budget_met"]) == (200, True)
        assert slow.seconds > 10
        assert (await site.classify(headers={"X-Latency-Budget-Ms": "60"})).status == 200

    site(scenario)
