"""The driver with a fake engine, in virtual time: who gets which answer, who none, and what becomes of a bad engine."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator, Sequence
from unittest import mock

import numpy as np
import pytest

from scala_model.width import Width
from server import serve_loop
from server.admission import Admission
from server.device import Device, EngineHung
from server.errors import EngineFailed, RequestError, Shed, Unavailable
from server.latency_profile import LatencyProfile
from server.lifecycle import Lifecycle
from server.load_monitor import LoadMonitor
from server.metrics import Metrics
from server.planner import PlanInputs, Planner
from server.policies.adaptive import Adaptive
from server.request_queue import RequestQueue
from server.serve_loop import ServeLoop
from server.types import Answer, Job, Terms
from tests.unit.fake_engine import FakeEngine, usual_seconds
from tests.unit.situations import plan_that_ranks
from tests.unit.virtual_time import Clock, run

NARROW, WIDE = Width(0.25), Width(1.0)
WIDTHS = (NARROW, Width(0.5), WIDE)
SIZE = 2
WIDEST_FIRST = [(width, size, 0.01 * (4 * width + size)) for width in (2, 1, 0) for size in (4, 2, 1)]


class Bench:
    """A serve loop and its parts. Unless ``cold``, the profile knows the fake engine: 40 ms at full width.

    Its plan ranks the widest width and the largest batch first, and stays as it is.
    """

    def __init__(self, clock: Clock, *, cold: bool = False) -> None:
        self.clock, self.engine = clock, FakeEngine(clock)
        self.queue, self.monitor, self.lifecycle, self.metrics = RequestQueue(), LoadMonitor(), Lifecycle(), Metrics()
        self.profile = LatencyProfile({width: 0.5 + float(width) / 5 for width in WIDTHS}, self.engine.max_batch)
        for width in WIDTHS if not cold else ():
            for batch in self.profile.buckets:
                self.profile.record(width, batch, [usual_seconds(width, [0] * batch)] * 20)
        self.device = Device(self.engine, self.lifecycle, self.engine.num_classes)
        self.admission = Admission(
            self.queue, self.profile, self.monitor, self.device, max_images=100, max_body_bytes=1000
        )
        self.policy = Adaptive(plan_that_ranks(*WIDEST_FIRST))
        self.told: list[PlanInputs] = []
        self.planner = Planner(self.policy, self.profile, self.monitor, WIDTHS, 10.0, 100, self.told.append)
        self.loop = ServeLoop(
            self.device,
            self.policy,
            self.queue,
            self.profile,
            self.monitor,
            self.admission,
            self.lifecycle,
            self.metrics,
            SIZE,
            self.planner,
        )

    def put(self, image: int, budget_s: float = 10.0, widths: tuple[Width, ...] = WIDTHS) -> Job:
        """An image of class ``image`` in the queue."""
        now = self.clock.now
        job = Job(Terms(now, now + budget_s, now + budget_s, widths), np.full((SIZE, SIZE, 3), image, np.uint8), now)
        self.queue.put(job)
        return job

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


@pytest.fixture(autouse=True)
def _no_real_plan() -> Iterator[None]:
    """It would take a tenth of a second for each test."""
    with mock.patch.object(PlanInputs, "make", return_value=plan_that_ranks(*WIDEST_FIRST)):
        yield


def seen(answer: Answer) -> int:
    return int(answer.probabilities.argmax())


async def outcomes(jobs: Sequence[Job]) -> list[Answer | BaseException]:
    return await asyncio.gather(*(job.answer for job in jobs), return_exceptions=True)


# -- answers


def test_every_job_gets_its_own_answer() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        serving = asyncio.create_task(bench.loop.serve())
        jobs = [bench.put(image) for image in (7, 3, 11, 5, 2, 13)]
        answers = await asyncio.gather(*(job.answer for job in jobs))
        assert [seen(answer) for answer in answers] == [7, 3, 11, 5, 2, 13]
        assert bench.engine.served == [(WIDE, [7, 3, 11, 5]), (WIDE, [2, 13])]
        assert [answer.batch_size for answer in answers] == [4] * 4 + [2] * 2
        assert all(job.dispatched for job in jobs)
        assert not serving.done()

    run(scenario)


def test_an_answer_tells_how_long_it_waited_and_ran() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        asyncio.create_task(bench.loop.serve())  # noqa: RUF006
        jobs = [bench.put(image, widths=(WIDE,)) for image in range(1, 6)]
        first, *_, last = await asyncio.gather(*(job.answer for job in jobs))
        assert (first.width, last.width) == (WIDE, WIDE)
        assert (first.queue_s, first.inference_s) == pytest.approx((0.0, 0.100))
        assert (last.queue_s, last.inference_s) == pytest.approx((0.100, 0.040))
        assert last.ran_until == clock.now

    run(scenario)


def test_what_is_late_anyway_is_refused_and_never_run() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        asyncio.create_task(bench.loop.serve())  # noqa: RUF006
        late, good = bench.put(1, 0.005), bench.put(2)
        refusal, answer = await outcomes([late, good])
        assert isinstance(refusal, Shed)
        assert isinstance(answer, Answer)
        assert bench.engine.served == [(WIDE, [2])]

    run(scenario)


def test_what_happened_is_recorded() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        bench.engine.seconds = lambda width, images: 2 * usual_seconds(width, images)
        asyncio.create_task(bench.loop.serve())  # noqa: RUF006
        await outcomes([bench.put(image) for image in (1, 2, 3)])
        assert bench.sample("scala_width_selected_total", width="1") == 3
        assert bench.sample("scala_batch_size_sum") == 3
        assert bench.sample("scala_batch_size_count") == 1
        assert bench.monitor.interference(clock.now) == pytest.approx(1.3), "three take 160 ms; four should take 100"
        assert bench.monitor.prediction_error == pytest.approx(1.03)
        assert bench.profile.p50(WIDE, 4) == pytest.approx(0.100), "one slow batch is not what the machine can do"

    run(scenario)


def test_the_device_is_free_when_its_batch_is_done_however_long_that_was_expected_to_take() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        bench.monitor.see_machine(39, 1, 2)  # a warning of a factor of 20 that proves to be wrong
        asyncio.create_task(bench.loop.serve())  # noqa: RUF006
        job = bench.put(1)
        await asyncio.sleep(0.001)
        assert bench.device.free_by == pytest.approx(clock.now + 0.8, abs=0.01)
        await job.answer
        assert bench.device.free_by <= clock.now

    run(scenario)


# -- work that nobody waits for


def test_jobs_abandoned_in_the_queue_never_reach_the_engine() -> None:
    """Whatever nobody waits for any more is not computed."""

    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        asyncio.create_task(bench.loop.serve())  # noqa: RUF006
        running = [bench.put(image) for image in (1, 2, 3, 4)]
        await asyncio.sleep(0.010)
        gone, expired, good = (bench.put(image) for image in (5, 6, 7))
        gone.answer.cancel()
        expired.answer.set_exception(RequestError("late"))
        assert isinstance(expired.answer.exception(), RequestError)
        await outcomes([*running, good])
        assert bench.engine.served == [(WIDE, [1, 2, 3, 4]), (WIDE, [7])]
        assert not gone.dispatched
        assert not expired.dispatched

    run(scenario)


def test_a_job_abandoned_at_the_very_moment_of_its_dispatch_never_reaches_the_engine() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        asyncio.create_task(bench.loop.serve())  # noqa: RUF006
        await asyncio.sleep(0.001)
        gone = bench.put(5)  # wakes the loop up ...
        gone.answer.cancel()  # ... which finds it settled
        await asyncio.sleep(1)
        assert bench.engine.served == []
        assert not gone.dispatched
        good, gone = bench.put(6), bench.put(7)
        gone.answer.cancel()
        await good.answer
        assert bench.engine.served == [(WIDE, [6])]

    run(scenario)


def test_jobs_abandoned_while_they_run_disturb_nobody() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        serving = asyncio.create_task(bench.loop.serve())
        jobs = [bench.put(image) for image in (1, 2, 3)]
        await asyncio.sleep(0.010)
        assert jobs[1].dispatched
        jobs[1].answer.cancel()
        first, _, third = await outcomes(jobs)
        assert isinstance(first, Answer)
        assert isinstance(third, Answer)
        assert (seen(first), seen(third)) == (1, 3)
        assert not serving.done()

    run(scenario)


def test_time_that_the_engine_spends_on_answers_that_come_too_late_is_counted() -> None:
    """Of a batch of four, 100 ms at full width, the client of one leaves and the deadline of another passes."""

    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        bench.engine.seconds = lambda width, images: 2 * usual_seconds(width, images)
        asyncio.create_task(bench.loop.serve())  # noqa: RUF006
        left, late, *others = bench.put(1), bench.put(2, 0.15), bench.put(3), bench.put(4)
        await asyncio.sleep(0.010)
        left.answer.cancel()
        await outcomes([late, *others])
        assert bench.engine.served == [(WIDE, [2, 1, 3, 4])]
        assert bench.sample("scala_engine_seconds_total", use="wasted") == pytest.approx(0.100)
        assert bench.sample("scala_engine_seconds_total", use="answered") == pytest.approx(0.100)

    run(scenario)


# -- a bad engine


def test_an_error_of_the_engine_fails_its_batch_and_no_other() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)

        def seconds(width: Width, images: list[int]) -> float:
            if 3 in images:
                raise RuntimeError("out of memory")
            return usual_seconds(width, images)

        bench.engine.seconds = seconds
        serving = asyncio.create_task(bench.loop.serve())
        done = await outcomes([bench.put(image) for image in (1, 2, 3, 4, 5, 6, 7, 8)])
        assert [type(outcome) for outcome in done] == [EngineFailed] * 4 + [Answer] * 4
        assert bench.lifecycle.failed is None
        assert not serving.done()

    run(scenario)


def test_three_errors_in_a_row_fail_the_server_and_tell_everyone() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)

        def seconds(width: Width, images: list[int]) -> float:
            raise RuntimeError("poisoned")

        bench.engine.seconds = seconds
        serving = asyncio.create_task(bench.loop.serve())
        done = await outcomes([bench.put(image) for image in range(1, 21)])
        assert [type(outcome) for outcome in done] == [EngineFailed] * 12 + [Unavailable] * 8
        assert len(bench.engine.served) == 3
        with pytest.raises(EngineHung):
            await serving
        assert bench.lifecycle.failed == "3 batches in a row raised RuntimeError"
        assert len(bench.queue) == 0

    run(scenario)


def test_errors_that_are_not_in_a_row_are_forgiven() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)

        def seconds(width: Width, images: list[int]) -> float:
            if len(bench.engine.served) % 3:
                raise RuntimeError("now and then")
            return usual_seconds(width, images)

        bench.engine.seconds = seconds
        serving = asyncio.create_task(bench.loop.serve())
        done = await outcomes([bench.put(image) for image in range(1, 41)])
        assert [type(outcome) for outcome in done[:12]] == [EngineFailed] * 8 + [Answer] * 4
        assert bench.lifecycle.failed is None
        assert not serving.done()

    run(scenario)


def test_a_batch_for_which_there_is_no_memory_is_told_so_and_the_next_is_served() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        serving = asyncio.create_task(bench.loop.serve())
        with mock.patch("numpy.stack", side_effect=MemoryError):
            told = await outcomes([bench.put(image) for image in (1, 2)])
        assert [type(each) for each in told] == [Unavailable] * 2
        assert "no memory" in str(told[0])
        assert [seen(await bench.put(image).answer) for image in (3, 4, 5)] == [3, 4, 5]
        assert not serving.done()

    run(scenario)


@pytest.mark.parametrize(
    "broken", ["numpy.stack", "server.device.Device.result", "server.serve_loop.ServeLoop._record"]
)
def test_whatever_ends_the_serving_nobody_who_was_taken_waits_in_vain(broken: str) -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        with mock.patch(broken, side_effect=ZeroDivisionError), mock.patch.object(serve_loop, "MAX_FAILURES", 1):
            serving = asyncio.create_task(bench.loop.serve())
            jobs = [bench.put(image) for image in range(1, 9)]
            with pytest.raises((ZeroDivisionError, EngineHung)):
                await serving
        bench.loop.drop_all("gone")
        assert all(isinstance(each, RequestError) for each in await asyncio.wait_for(outcomes(jobs), 1))

    run(scenario)


@pytest.mark.parametrize(("usual_s", "watchdog_s"), [(0.04, 2.0), (1.0, 10.0)])
def test_an_engine_that_hangs_fails_the_server_after_ten_times_its_p99_and_at_least_2_s(
    usual_s: float, watchdog_s: float
) -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock)
        bench.profile.record(WIDE, 1, [usual_s] * 400)
        bench.engine.seconds = lambda width, images: math.inf
        serving = asyncio.create_task(bench.loop.serve())
        started = clock.now
        running, waiting = bench.put(1, 20.0, (WIDE,)), []
        await asyncio.sleep(0.5)
        waiting = [bench.put(image, 100.0) for image in (2, 3, 4, 5, 6, 7)]
        done = await outcomes([running, *waiting])
        assert {type(outcome) for outcome in done} == {Unavailable}
        assert clock.now - started == pytest.approx(watchdog_s)
        with pytest.raises(EngineHung):
            await serving
        assert bench.lifecycle.failed is not None
        assert "no answer in" in bench.lifecycle.failed

    run(scenario)


# -- the start


def test_the_narrowest_and_the_widest_are_warmed_first_and_then_the_server_has_started() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)
        started: list[tuple[Width, int, bool]] = []

        def seconds(width: Width, images: list[int]) -> float:
            started.append((width, len(images), bench.lifecycle.started))
            return usual_seconds(width, images)

        bench.engine.seconds = seconds
        await bench.loop.start()
        cells = list(dict.fromkeys(started))
        assert cells[:2] == [(NARROW, 1, False), (WIDE, 1, False)]
        assert {cell[2] for cell in cells[2:]} == {True}
        for width in WIDTHS:
            sizes = [batch for which, batch, _ in started if which == width]
            assert list(dict.fromkeys(sizes)) == [1, 2, 4], "small batches first"
        for width in WIDTHS:
            assert bench.profile.warmed(width) == (1, 2, 4)
            assert [bench.profile.p99(width, batch) for batch in (1, 2, 4)] == [
                pytest.approx(usual_seconds(width, [0] * batch)) for batch in (1, 2, 4)
            ]
        assert bench.sample("scala_batch_size_count") == 0, "the warm-up is no traffic"

    run(scenario)


def test_a_server_of_one_width_is_not_ready_without_it() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)
        bench.admission.fixed = Width(0.5)
        starting = asyncio.create_task(bench.loop.start())
        while not bench.lifecycle.started:
            assert not starting.done()
            await asyncio.sleep(0.001)
        assert bench.profile.ready(Width(0.5))
        await starting

    run(scenario)


def test_there_is_a_plan_before_the_server_is_ready() -> None:
    """For the two widths that it can run by then."""

    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)
        starting = asyncio.create_task(bench.loop.start())
        while not bench.lifecycle.started:
            assert not bench.told
            await asyncio.sleep(0.001)
        [inputs] = bench.told
        assert [len(row) for row in inputs.seconds] == [1, 0, 1]
        await starting

    run(scenario)


def test_a_batch_that_the_device_cannot_hold_leaves_the_smaller_ones() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)

        def seconds(width: Width, images: list[int]) -> float:
            if width == WIDE and len(images) > 2:
                raise MemoryError
            return usual_seconds(width, images)

        bench.engine.seconds = seconds
        await bench.loop.start()
        assert [bench.profile.max_batch(width) for width in WIDTHS] == [4, 4, 2]
        asyncio.create_task(bench.loop.serve())  # noqa: RUF006
        done = await outcomes([bench.put(image, widths=(WIDE,)) for image in (1, 2, 3)])
        assert [type(outcome) for outcome in done] == [Answer] * 3
        assert bench.engine.served == [(WIDE, [1, 2]), (WIDE, [3])]
        assert bench.lifecycle.failed is None

    run(scenario)


def test_the_first_run_of_a_cell_is_not_measured() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)
        known: set[tuple[Width, int]] = set()

        def seconds(width: Width, images: list[int]) -> float:
            first = (width, len(images)) not in known
            known.add((width, len(images)))
            return 5.0 if first else usual_seconds(width, images)  # whatever an engine does once: compile, allocate

        bench.engine.seconds = seconds
        await bench.loop.start()
        assert bench.profile.p99(WIDE, 1) == pytest.approx(0.040)

    run(scenario)


def test_requests_are_served_while_the_rest_is_calibrated() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)
        starting = asyncio.create_task(bench.loop.start())
        serving = asyncio.create_task(bench.loop.serve())
        while not bench.lifecycle.started:
            await asyncio.sleep(0.010)
        answers = await asyncio.gather(*(bench.put(image).answer for image in (1, 2, 3)))
        assert [seen(answer) for answer in answers] == [1, 2, 3]
        assert {answer.width for answer in answers} <= {NARROW, WIDE}
        assert not starting.done()
        assert not serving.done()
        await starting

    run(scenario)


def test_a_request_that_waits_for_a_slow_calibration_run_is_no_hanging_engine() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)
        bench.engine.seconds = lambda width, images: 3.0 if len(images) == 4 else usual_seconds(width, images)
        starting = asyncio.create_task(bench.loop.start())
        serving = asyncio.create_task(bench.loop.serve())
        while not any(len(images) == 4 for _, images in bench.engine.batches):
            await asyncio.sleep(0.010)
        answer = await bench.put(1, 30.0).answer
        assert seen(answer) == 1
        await starting
        assert bench.lifecycle.failed is None
        assert not serving.done()

    run(scenario)


def test_an_engine_that_cannot_be_loaded_never_starts() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)

        def load(width: Width, batch: int) -> None:
            raise OSError("no such device")

        bench.engine.load = load  # type: ignore[method-assign]
        with pytest.raises(OSError, match="no such device"):
            await bench.loop.start()
        assert not bench.lifecycle.started
        assert bench.engine.batches == []

    run(scenario)


def test_an_engine_that_hangs_while_it_is_warmed_never_starts() -> None:
    async def scenario(clock: Clock) -> None:
        bench = Bench(clock, cold=True)
        bench.engine.seconds = lambda width, images: math.inf
        with pytest.raises(EngineHung):
            await bench.loop.start()
        assert not bench.lifecycle.started

    run(scenario)


# -- threads


def test_the_engine_runs_on_one_thread_that_is_not_the_event_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_loop, "CALIBRATION_RUNS", 1)
    monkeypatch.setattr(serve_loop, "MIN_HANG_S", 60.0)  # in real time, on a machine that may be busy
    threads: set[int] = set()

    async def scenario() -> None:
        bench = Bench(Clock(), cold=True)

        def seconds(width: Width, images: list[int]) -> float:
            threads.add(threading.get_ident())
            return 0.0

        bench.engine.seconds = seconds
        await bench.loop.start()
        serving = asyncio.create_task(bench.loop.serve())
        bench.clock.now = asyncio.get_running_loop().time()
        assert seen(await bench.put(9, 60.0).answer) == 9
        serving.cancel()
        bench.loop.close()

    asyncio.run(scenario())
    assert len(threads) == 1
    assert threading.get_ident() not in threads
