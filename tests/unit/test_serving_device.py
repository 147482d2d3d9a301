"""The engine's thread and its two places, in virtual time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np
import pytest

from scala_model.width import Width
from server.device import Device, EngineHung, Errand, Ran
from server.lifecycle import Lifecycle
from server.types import Probabilities
from tests.unit.fake_engine import FakeEngine
from tests.unit.virtual_time import Clock, run

WIDE = Width(1.0)


class Desk:
    """A device on which one image takes 40 ms and two take 60."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.lifecycle = clock, Lifecycle()
        self.device = Device(FakeEngine(clock), self.lifecycle, 200)

    async def hand_over(self, images: int = 1, *, median_s: float = 0.04, since: float | None = None) -> Errand:
        await self.device.places.acquire()
        pixels = np.full((images, 2, 2, 3), 7, np.uint8)
        return self.device.hand_over(
            pixels, WIDE, median_s=median_s, p99_s=median_s + 0.03, patience_s=2.0, since=since
        )

    async def runs(self, *errands: Errand) -> list[Ran]:
        return await asyncio.gather(*map(self.device.result, errands))


def test_what_waits_behind_a_batch_begins_when_that_ends() -> None:
    async def scenario(clock: Clock) -> None:
        desk, start = Desk(clock), clock.now
        first, second = await desk.runs(await desk.hand_over(1), await desk.hand_over(2))
        assert (first.began - start, first.ended - start) == pytest.approx((0.0, 0.04))
        assert (second.began - start, second.ended - start, second.seconds) == pytest.approx((0.04, 0.10, 0.06))
        assert (first.idle_s, second.idle_s) == pytest.approx((0.0, 0.0))

    run(scenario)


def test_idle_is_what_the_device_stood_still_though_a_batch_could_have_been_run() -> None:
    """The images of the second came 10 ms before the first ended, and were handed over 5 ms after."""

    async def scenario(clock: Clock) -> None:
        desk = Desk(clock)
        await desk.runs(await desk.hand_over())
        ended = clock.now
        await asyncio.sleep(0.005)
        (late,) = await desk.runs(await desk.hand_over(since=ended - 0.010))
        assert late.idle_s == pytest.approx(0.005)
        await asyncio.sleep(1.0)
        (fresh,) = await desk.runs(await desk.hand_over(since=clock.now))
        assert fresh.idle_s == 0, "nobody was there"

    run(scenario)


def test_a_third_has_to_wait_for_a_place() -> None:
    async def scenario(clock: Clock) -> None:
        desk, start = Desk(clock), clock.now
        errands = [await desk.hand_over(), await desk.hand_over()]
        done = asyncio.gather(*map(desk.device.result, errands))
        third = await desk.hand_over()
        assert clock.now - start == pytest.approx(0.04)
        await done
        await desk.device.result(third)
        assert clock.now - start == pytest.approx(0.12)

    run(scenario)


def test_nobody_has_to_wait_for_what_follows() -> None:
    """The wait for the second is over before the first ends: nothing is left of it to be put off."""

    async def scenario(clock: Clock) -> None:
        desk, faults = Desk(clock), list[object]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        first, second = await desk.hand_over(), await desk.hand_over()
        waiting = asyncio.create_task(desk.device.result(second))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await desk.device.result(first)
        await asyncio.sleep(1.0)
        assert not faults
        assert desk.device.free_at == pytest.approx(clock.now - 0.96)

    run(scenario)


def test_it_foresees_when_it_will_be_free() -> None:
    """Both batches should take 50 ms, at most 80; margins add up as those of independent times. The first takes 40."""

    async def scenario(clock: Clock) -> None:
        desk, start = Desk(clock), clock.now
        device = desk.device
        first = await desk.hand_over(median_s=0.05)
        assert (device.free_at - start, device.free_by - start) == pytest.approx((0.05, 0.08))
        second = await desk.hand_over(median_s=0.05)
        assert (device.free_at - start, device.free_by - start) == pytest.approx((0.10, 0.10 + 0.03 * 2**0.5))
        await device.result(first)
        assert (device.free_at - start, device.free_by - start) == pytest.approx((0.09, 0.12))
        await device.result(second)
        assert (device.free_at, device.free_by) == pytest.approx((clock.now, clock.now))

    run(scenario)


def test_it_tells_shortly_before_it_should_be_free_or_once_it_is() -> None:
    async def scenario(clock: Clock) -> None:
        desk, start = Desk(clock), clock.now
        await desk.device.nearly_free(0.01)
        assert clock.now == start, "nothing is in hand"
        errand = await desk.hand_over(median_s=0.03)
        await desk.device.nearly_free(0.01)
        assert clock.now - start == pytest.approx(0.02)
        await desk.device.result(errand)
        errand = await desk.hand_over(median_s=10.0)
        await desk.device.nearly_free(0.01)
        assert clock.now - start == pytest.approx(0.08), "it took 40 ms, not ten seconds"
        await desk.device.result(errand)

    run(scenario)


def test_a_run_that_raises_gives_its_place_back() -> None:
    async def scenario(clock: Clock) -> None:
        desk = Desk(clock)

        def seconds(width: Width, images: list[int]) -> float:
            raise RuntimeError("bad")

        usual, desk.device.engine.seconds = desk.device.engine.seconds, seconds  # type: ignore[attr-defined]
        for _ in range(3):
            errand = await desk.hand_over()
            with pytest.raises(RuntimeError, match="bad"):
                await desk.device.result(errand)
        desk.device.engine.seconds = usual  # type: ignore[attr-defined]
        await desk.runs(await desk.hand_over(), await desk.hand_over())

    run(scenario)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda good: np.full_like(good, np.nan), "no probabilities"),
        (lambda good: np.where([[True], [False]], good, np.inf), "no probabilities"),
        (lambda good: good * 1.01, "no probabilities"),
        (lambda good: good + np.array([1, -1] * 100, np.float32), "no probabilities"),
        (lambda good: np.zeros_like(good), "no probabilities"),
        (lambda good: good[:1], r"\(1, 200\) for \(2, 200\)"),
        (lambda good: good[:, :199], r"\(2, 199\) for \(2, 200\)"),
        (lambda good: good[None], r"\(1, 2, 200\) for \(2, 200\)"),
    ],
)
def test_what_is_no_probabilities_is_an_error_and_not_an_answer(
    spoil: Callable[[Probabilities], Probabilities], said: str
) -> None:
    async def scenario(clock: Clock) -> None:
        desk = Desk(clock)
        works, engine = desk.device.engine.run, desk.device.engine
        engine.run = lambda pixels, width: spoil(works(pixels, width))  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match=said):
            await desk.device.result(await desk.hand_over(2))
        engine.run = works  # type: ignore[method-assign]
        await desk.runs(await desk.hand_over(2))

    run(scenario)


def test_what_waits_behind_a_hang_is_given_up_at_the_same_time() -> None:
    async def scenario(clock: Clock) -> None:
        desk, start = Desk(clock), clock.now
        desk.device.engine.seconds = lambda width, images: float("inf")  # type: ignore[attr-defined]
        errands = [await desk.hand_over(), await desk.hand_over()]
        failed = await asyncio.gather(*map(desk.device.result, errands), return_exceptions=True)
        assert [type(error) for error in failed] == [EngineHung] * 2
        assert clock.now - start == pytest.approx(2.0)
        assert desk.lifecycle.failed == "no answer in 2.0 s"
        with pytest.raises(EngineHung, match=r"no answer in 2\.0 s"):
            await desk.hand_over()

    run(scenario)


def test_a_hang_is_told_by_its_own_patience_and_not_by_that_of_what_ran_before() -> None:
    """The first might have taken a minute, and took 40 ms."""

    async def scenario(clock: Clock) -> None:
        desk, start = Desk(clock), clock.now
        pixels = np.zeros((1, 2, 2, 3), np.uint8)
        await desk.device.places.acquire()
        first = desk.device.hand_over(pixels, WIDE, median_s=0.0, p99_s=0.0, patience_s=60.0)
        desk.device.engine.seconds = lambda width, images: float("inf")  # type: ignore[attr-defined]
        second = await desk.hand_over()
        waiting = asyncio.create_task(desk.device.result(second))
        await desk.device.result(first)
        with pytest.raises(EngineHung):
            await waiting
        assert clock.now - start == pytest.approx(2.04)

    run(scenario)


def test_a_process_that_was_held_still_gives_its_engine_the_time_it_did_not_have() -> None:
    """Five seconds pass for nobody: neither for the event loop, whose timers are overdue then, nor for the engine."""

    async def scenario(clock: Clock) -> None:
        desk, start = Desk(clock), clock.now
        usual, desk.device.engine.seconds = desk.device.engine.seconds, lambda width, images: 5.04  # type: ignore[attr-defined]
        errands = [await desk.hand_over()]
        desk.device.engine.seconds = usual  # type: ignore[attr-defined]
        errands.append(await desk.hand_over())
        waiting = asyncio.create_task(desk.runs(*errands))
        await asyncio.sleep(0.01)
        clock.spend(5.0)
        first, second = await waiting
        assert (first.ended - start, second.ended - start) == pytest.approx((5.04, 5.08))
        assert desk.lifecycle.failed is None

    run(scenario)


def test_who_was_held_still_is_not_waited_for_twice() -> None:
    async def scenario(clock: Clock) -> None:
        desk, start = Desk(clock), clock.now
        desk.device.engine.seconds = lambda width, images: float("inf")  # type: ignore[attr-defined]
        errands = [await desk.hand_over(), await desk.hand_over()]
        waiting = asyncio.gather(*map(desk.device.result, errands), return_exceptions=True)
        await asyncio.sleep(0.01)
        clock.spend(5.0)
        assert [type(error) for error in await waiting] == [EngineHung] * 2
        assert clock.now - start == pytest.approx(5.01 + 1.0)

    run(scenario)


def test_two_runs_that_end_before_the_event_loop_looks_are_two_results() -> None:
    """The wait for the second is over at once then, before the end of the first is known."""

    async def scenario() -> None:
        faults: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        desk = Desk(Clock())
        errands = [await desk.hand_over(), await desk.hand_over()]
        time.sleep(0.05)
        assert len(await desk.runs(*errands)) == 2
        await asyncio.sleep(0.01)
        assert not faults
        assert desk.device.free_at <= time.monotonic()
        desk.device.close()

    asyncio.run(scenario())
