"""The driver and its device, in virtual time: widths that come one by one, latencies remembered, lack of memory."""

from __future__ import annotations

import asyncio
import math

import pytest

from scala_model.width import Width
from server.device import EngineHung
from server.engine.contract import DeviceLost, DeviceOutOfMemory
from server.errors import Unavailable
from server.profile_store import Key, Table
from server.serve_loop import RETRY_MEMORY_S
from server.types import Answer
from tests.unit.fake_engine import usual_seconds
from tests.unit.test_serve_loop import NARROW, WIDE, WIDTHS, Bench, _no_real_plan, outcomes, seen  # noqa: F401
from tests.unit.virtual_time import Clock, run

MIDDLE = Width(0.5)


def scarce(bench: Bench, fits: dict[Width, int]) -> None:
    """From now on the device has memory for so many images at a width, and for any number at those not named."""

    def seconds(width: Width, images: list[int]) -> float:
        if len(images) > fits.get(width, math.inf):
            raise DeviceOutOfMemory("out of memory")
        return usual_seconds(width, images)

    bench.engine.seconds = seconds


# -- widths come one by one


def test_the_server_is_ready_with_two_widths_and_gains_the_others() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)
        loaded_when_ready: list[tuple[Width, int]] = []

        def load(width: Width, batch: int) -> None:
            clock.spend(1.0)
            if bench.lifecycle.started:
                loaded_when_ready.append((width, batch))

        bench.engine.load = load  # type: ignore[method-assign]
        asyncio.create_task(bench.loop.serve())  # noqa: RUF006
        starting = asyncio.create_task(bench.loop.start())
        while not bench.lifecycle.started:
            await asyncio.sleep(0.01)
        assert [bench.profile.ready(width) for width in WIDTHS] == [True, False, True]
        asked = clock.now
        assert seen(await bench.put(7).answer) == 7
        assert clock.now - asked < 0.1, "whoever asks does not wait for the load"
        await starting
        assert loaded_when_ready == [(MIDDLE, 1), (NARROW, 4), (MIDDLE, 4), (WIDE, 4)], "batches come last"
        assert all(map(bench.profile.ready, WIDTHS))

    run(scenario)


def test_a_width_that_cannot_be_loaded_is_left_out() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)

        def load(width: Width, batch: int) -> None:
            if width == MIDDLE:
                raise RuntimeError("unsupported shape")

        bench.engine.load = load  # type: ignore[method-assign]
        await bench.loop.start()
        assert [bench.profile.max_batch(width) for width in WIDTHS] == [4, 0, 4]
        assert MIDDLE not in {width for width, _ in bench.engine.batches}

    run(scenario)


# -- latencies remembered


def test_what_a_table_remembers_is_warmed_once_and_scaled_by_what_is_measured_today() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)
        half_s = {  # the machine is twice as slow today
            (width, batch): [usual_seconds(width, [0] * batch) / 2] * 20 for width in WIDTHS for batch in (1, 2, 4)
        }
        del half_s[MIDDLE, 4]
        await bench.loop.start(Table.of(Key("cpu", "fake", 1, "sha", 4), half_s))
        runs = [(width, len(images)) for width, images in bench.engine.batches]
        assert runs[1:41] == [(WIDE, 1), (NARROW, 1)] * 20, "another width between any two that are measured"
        assert runs.count((WIDE, 1)) == 20 + 21, "in turns with the narrowest, of which one more warms it"
        assert runs.count((MIDDLE, 4)) == 21, "not in the table"
        assert runs.count((WIDE, 4)) == runs.count((MIDDLE, 1)) == 2, "one to warm it, one to see that it is so"
        assert bench.loop.measured_anew
        for width in WIDTHS:
            for batch in (1, 2, 4):
                assert bench.profile.p50(width, batch) == pytest.approx(usual_seconds(width, [0] * batch))

    run(scenario)


def test_a_cell_that_is_remembered_wrongly_is_measured_anew() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)
        table_s = {(width, batch): [usual_seconds(width, [0] * batch)] * 20 for width in WIDTHS for batch in (1, 2, 4)}
        table_s[WIDE, 4] = [1.0] * 20
        await bench.loop.start(Table.of(Key("cpu", "fake", 1, "sha", 4), table_s))
        assert bench.profile.p99(WIDE, 4) == pytest.approx(usual_seconds(WIDE, [0] * 4))
        assert bench.loop.measured_anew

    run(scenario)


def test_a_table_that_is_right_is_not_written_again() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)
        table_s = {(width, batch): [usual_seconds(width, [0] * batch)] * 20 for width in WIDTHS for batch in (1, 2, 4)}
        await bench.loop.start(Table.of(Key("cpu", "fake", 1, "sha", 4), table_s))
        assert not bench.loop.measured_anew

    run(scenario)


# -- a load that hangs


@pytest.mark.parametrize("hanging", [WIDE, MIDDLE])
def test_a_load_that_hangs_is_a_hanging_engine(hanging: Width) -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)

        def load(width: Width, batch: int) -> None:
            if width == hanging:
                clock.spend(math.inf)

        bench.engine.load = load  # type: ignore[method-assign]
        with pytest.raises(EngineHung, match=f"width {hanging} was not loaded in 300 s"):
            await bench.loop.start()

    run(scenario)


def test_who_waits_for_a_calibration_run_that_hangs_hears_of_it_at_once() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)

        def seconds(width: Width, images: list[int]) -> float:
            return math.inf if width == MIDDLE else usual_seconds(width, images)

        bench.engine.seconds = seconds
        serving = asyncio.create_task(bench.loop.serve())
        starting = asyncio.create_task(bench.loop.start())
        while not any(width == MIDDLE for width, _ in bench.engine.batches):
            await asyncio.sleep(0.01)
        job = bench.put(5, 1000.0)
        with pytest.raises(EngineHung):
            await starting
        failed_at = clock.now
        [outcome] = await outcomes([job])
        assert isinstance(outcome, Unavailable), outcome
        assert clock.now == failed_at
        with pytest.raises(EngineHung):
            await serving

    run(scenario)


# -- memory that runs out


def test_a_batch_without_memory_is_split_and_nobody_is_lost() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        scarce(bench, {WIDE: 2})
        asyncio.create_task(bench.loop.serve())  # noqa: RUF006
        done = await outcomes([bench.put(image, widths=(WIDE,)) for image in (1, 2, 3, 4)])
        assert [seen(answer) for answer in done if isinstance(answer, Answer)] == [1, 2, 3, 4]
        assert bench.engine.served == [(WIDE, [1, 2, 3, 4]), (WIDE, [1, 2]), (WIDE, [3, 4])]
        assert bench.profile.max_batch(WIDE) == 2
        assert bench.lifecycle.failed is None

    run(scenario)


def test_an_image_without_memory_gets_a_narrower_width() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        scarce(bench, {WIDE: 0})
        asyncio.create_task(bench.loop.serve())  # noqa: RUF006
        answer = await bench.put(9).answer
        assert (seen(answer), answer.width) == (9, MIDDLE)

    run(scenario)


def test_who_leaves_while_the_device_runs_out_of_memory_is_not_run_again() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        scarce(bench, {WIDE: 1})
        asyncio.create_task(bench.loop.serve())  # noqa: RUF006
        staying, leaving = bench.put(1, widths=(WIDE,)), bench.put(2, widths=(WIDE,))
        while not staying.dispatched:
            await asyncio.sleep(0)
        leaving.answer.cancel()
        assert seen(await staying.answer) == 1
        assert bench.engine.served == [(WIDE, [1, 2]), (WIDE, [1])]

    run(scenario)


def test_memory_that_comes_back_is_used_again() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        scarce(bench, {WIDE: 1})
        asyncio.create_task(bench.loop.serve())  # noqa: RUF006
        await outcomes([bench.put(image, widths=(WIDE,)) for image in (1, 2, 3, 4)])
        assert bench.profile.max_batch(WIDE) == 1
        await asyncio.sleep(2 * RETRY_MEMORY_S)
        assert bench.profile.max_batch(WIDE) == 1, "still none"
        scarce(bench, {})
        await asyncio.sleep(RETRY_MEMORY_S + 10)
        assert bench.profile.max_batch(WIDE) == 4

    run(scenario)


def test_lasting_lack_of_memory_is_tried_by_one_task_a_width() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        asyncio.create_task(bench.loop.serve())  # noqa: RUF006
        for fits in (1, 3, 1, 3, 1):
            scarce(bench, {WIDE: fits})
            await outcomes([bench.put(image, widths=(WIDE,)) for image in (1, 2, 3, 4)])
            await asyncio.sleep(RETRY_MEMORY_S + 10)
        before = len(bench.engine.batches)
        await asyncio.sleep(4 * RETRY_MEMORY_S)
        assert len(bench.engine.batches) - before <= 5

    run(scenario)


@pytest.mark.parametrize("fault", ["hangs", "is lost"])
def test_a_device_that_fails_while_memory_is_tried_again_fails_the_server(fault: str) -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        scarce(bench, {WIDE: 1})
        asyncio.create_task(bench.loop.serve())  # noqa: RUF006
        await outcomes([bench.put(image, widths=(WIDE,)) for image in (1, 2)])

        def seconds(width: Width, images: list[int]) -> float:
            if fault == "is lost":
                raise DeviceLost("gone")
            return math.inf

        bench.engine.seconds = seconds
        await asyncio.sleep(RETRY_MEMORY_S + 100)
        assert bench.lifecycle.failed is not None

    run(scenario)


def test_without_memory_for_a_single_image_the_server_fails_and_says_so() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        scarce(bench, dict.fromkeys(WIDTHS, 0))
        serving = asyncio.create_task(bench.loop.serve())
        done = await outcomes([bench.put(image) for image in (1, 2, 3)])
        assert {type(outcome) for outcome in done} == {Unavailable}
        with pytest.raises(EngineHung):
            await serving
        assert bench.lifecycle.failed == "no memory for a single image at any width"

    run(scenario)


# -- a device that is gone


def test_a_lost_device_fails_the_server_at_once_and_everyone_hears_of_it() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)

        def seconds(width: Width, images: list[int]) -> float:
            raise DeviceLost("an illegal memory access was encountered")

        bench.engine.seconds = seconds
        serving = asyncio.create_task(bench.loop.serve())
        done = await outcomes([bench.put(image) for image in range(1, 10)])
        assert {type(outcome) for outcome in done} == {Unavailable}
        assert len(bench.engine.served) == 1
        with pytest.raises(EngineHung, match="illegal memory access"):
            await serving
        assert not bench.lifecycle.ready

    run(scenario)


def test_a_device_lost_while_it_is_warmed_is_no_width_left_out() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)

        def seconds(width: Width, images: list[int]) -> float:
            if width == MIDDLE:
                raise DeviceLost("gone")
            return usual_seconds(width, images)

        bench.engine.seconds = seconds
        with pytest.raises(DeviceLost):
            await bench.loop.start()

    run(scenario)


# -- what others may believe of it meanwhile


def test_a_run_of_unknown_length_is_not_taken_for_a_long_one() -> None:
    """Nobody may be refused because a cell is run for the first time, which may take six seconds but does not."""

    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)
        starting = asyncio.create_task(bench.loop.start())
        foreseen_s = []
        while not starting.done():
            foreseen_s.append(bench.device.free_by - clock.now)
            await asyncio.sleep(0.001)
        assert 0.05 < max(foreseen_s) < 0.15, "at most 100 ms, of four images at full width, after some 10"

    run(scenario)


def test_nobody_is_lost_whose_batch_a_failed_device_does_not_take() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        serving = asyncio.create_task(bench.loop.serve())
        bench.lifecycle.fail("no answer to a run for nobody")
        done = await outcomes([bench.put(image) for image in (1, 2, 3, 4, 5, 6)])
        assert [type(outcome) for outcome in done] == [Unavailable] * 6
        with pytest.raises(EngineHung):
            await serving

    run(scenario)
