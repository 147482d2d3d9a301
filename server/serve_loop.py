"""The driver: form a batch, decide, run, settle, record. One device, one engine thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import compress
from statistics import median
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from scala_model.width import Width
from server.admission import Admission
from server.device import Device, EngineHung, Errand, Ran
from server.engine.contract import DeviceLost, DeviceOutOfMemory
from server.errors import EngineFailed, RequestError, Unavailable, no_memory
from server.latency_profile import LatencyProfile
from server.lifecycle import Lifecycle
from server.load_monitor import LoadMonitor
from server.metrics import Metrics
from server.planner import Planner
from server.policies import Policy
from server.policies.deadlines import soonest_of
from server.profile_store import Table, scale_of
from server.request_queue import RequestQueue
from server.types import Answer, Decision, Job, Load, QueueView

SURPRISE = 1.5  # times as slow or as fast as remembered, and a cell is measured anew
LOADERS = 2  # widths that are loaded at once: seven took 1.4 s instead of 2.0 on two cores
MIN_CALIBRATION_RUNS, CALIBRATION_RUNS, CALIBRATION_S = 3, 20, 2.0  # of a cell; a slow one is refined by traffic
FIRST_RUN_S = 6.0  # a cell's first run may compile or allocate: it is given ten times as long
MIN_HANG_S, LOADING_HANG_S, HANG_FACTOR = 2.0, 10.0, 10.0
RESTARTING = "The engine failed and the server is restarting; try again in a second."
LOAD_S = 300.0  # after which a width that is still being loaded is taken for a hang
RETRY_MEMORY_S = 30.0  # then a cell that ran out of memory is tried again
MAX_FAILURES = 3  # in a row; then the engine is taken for poisoned
Record = Callable[[QueueView, Load, float, Decision], None]  # hears of every decision and what it was made from
log = logging.getLogger("scala.serve")


class Batch(NamedTuple):
    """What was decided and handed over; ``profiled_s`` is what it takes in the idle machine's median."""

    jobs: Sequence[Job]
    decision: Decision
    errand: Errand
    profiled_s: float


class ServeLoop:
    """Owns the device. ``start`` loads and warms the engine; ``serve`` runs until cancelled or the engine fails."""

    def __init__(
        self,
        device: Device,
        policy: Policy,
        queue: RequestQueue,
        profile: LatencyProfile,
        monitor: LoadMonitor,
        admission: Admission,
        lifecycle: Lifecycle,
        metrics: Metrics,
        image_size: int,
        planner: Planner | None = None,
        record: Record | None = None,
    ) -> None:
        self._tell = record
        self._planner = planner
        self._device, self._engine = device, device.engine
        self._policy, self._queue, self._profile = policy, queue, profile
        self._monitor, self._admission, self._lifecycle, self._metrics = monitor, admission, lifecycle, metrics
        self._image_shape = (image_size, image_size, 3)
        self._loaders = ThreadPoolExecutor(LOADERS, thread_name_prefix="load")
        self._failures = self._num_loading = 0
        self._loaded: list[Width] = []  # for one image at least
        self._winning_back: dict[Width, asyncio.Task[None]] = {}
        self.measured_anew = False  # a cell that no table knew, or knew wrongly
        self._remembered: Callable[[Width, int], list[float]] = lambda width, batch: []

    async def serve(self) -> None:
        """Decide shortly before the device is free, so that it finds the next batch in hand when it is.

        Raises EngineHung when there is nothing more to be hoped for.
        """
        try:
            async with asyncio.TaskGroup() as batches:
                while True:
                    await self._queue.wait()
                    await self._device.places.acquire()
                    await self._device.nearly_free(self._monitor.notice.value_s(time.monotonic()))
                    await asyncio.sleep(0)  # what has just come back is settled first
                    if (batch := self._next()) is not None:
                        run = batches.create_task(self._run(*batch))
                        run.add_done_callback(partial(_forget_none, batch.jobs))
                    else:
                        self._device.places.release()
        except BaseExceptionGroup as failures:  # of which there is one, as the first cancels whatever follows
            raise failures.exceptions[0] from None

    def _next(self) -> Batch | None:
        """Decide and hand over, in one step: an admission in between would take the device for free. Whom the decision
        sheds hears so; None when nobody is left to be run."""
        if not len(self._queue):
            return None
        now = max(time.monotonic(), self._device.free_at)
        load = self._monitor.load(now)
        self._queue.postpone_overdue(partial(soonest_of, load=load, profile=self._profile, now=now))
        decision = self._policy(self._queue.view(), load, self._profile, now)
        if self._tell is not None:
            self._tell(self._queue.view(), load, now, decision)
        jobs, refused = self._take(decision)
        for job in refused:
            _settle(job, self._admission.shed("Even the narrowest width would be late"))
        if not jobs:
            return None
        log.debug("%s for %d of %d waiting", decision, len(jobs), len(jobs) + len(self._queue))
        for job in jobs:
            job.dispatched = True
        profiled_s = self._profile.p50(decision.width, len(jobs))
        try:
            errand = self._device.hand_over(
                np.stack([job.pixels for job in jobs]),
                decision.width,
                median_s=load.interference * profiled_s,
                p99_s=decision.predicted_s,
                patience_s=self._patience_s(decision.predicted_s),
                since=max(job.queued_at for job in jobs),
            )
        except EngineHung as error:  # a run that was for nobody
            self._fail(jobs, str(error))
        except MemoryError as error:
            log.warning("no memory for a batch of %d: %s", len(jobs), error)
            for job in jobs:
                _settle(job, no_memory())
            return None
        except BaseException:
            for job in jobs:
                _settle(job, Unavailable(RESTARTING))
            raise
        return Batch(jobs, decision, errand, profiled_s)

    async def start(self, table: Table | None = None) -> None:
        """Load and warm the engine; ready as soon as one image can be run at the narrowest and the widest width, and at
        the one that a fixed policy serves at.

        The others follow while these serve, and larger batches after them. What ``table`` remembers is scaled by
        what those two show of the machine today, and measured again only where one run finds it far off.
        """
        widths = self._profile.widths
        first = list(dict.fromkeys((widths[0], self._admission.fixed or widths[0], widths[-1])))
        others = [width for width in widths if width not in first]
        await asyncio.gather(*(self._load(width, 1) for width in first))
        for width in first:
            await self._calibrate(width, 1)
        if self._planner is not None:
            self._planner.refresh(time.monotonic())
        self._lifecycle.started = True
        if table is not None:
            self._remembered = partial(table.scaled_samples_s, scale=scale_of(table, self._profile))
        self.measured_anew = table is None
        log.info("ready")
        for i in range(0, len(others), LOADERS):
            await self._gain(others[i : i + LOADERS])
        log.info("all widths can run one image")
        growing = [width for width in widths if self._profile.ready(width)]
        growing = [width for width in growing if await self._can_load(width, self._engine.max_batch)]
        for bucket in self._profile.buckets[1:]:
            growing = [width for width in growing if await self._warm(width, bucket)]
        log.info("warmed: %s", {str(width): self._profile.max_batch(width) for width in widths})

    async def _gain(self, widths: Sequence[Width]) -> None:
        """Load some widths at once, for one image; none is measured while another is loaded."""
        loaded = await asyncio.gather(*(self._can_load(width, 1) for width in widths))
        for width in compress(widths, loaded):
            await self._warm(width, 1)

    async def _can_load(self, width: Width, batch: int) -> bool:
        return await self._possible(self._load(width, batch), f"load width {width} for batches of {batch}")

    async def _load(self, width: Width, batch: int) -> None:
        """Raises EngineHung, or whatever the engine raises."""
        loading = asyncio.get_running_loop().run_in_executor(self._loaders, self._engine.load, width, batch)
        self._num_loading += 1
        try:
            async with asyncio.timeout(LOAD_S):
                await asyncio.shield(loading)
            if width not in self._loaded:
                self._loaded.append(width)
        except TimeoutError:
            raise EngineHung(f"width {width} was not loaded in {LOAD_S:.0f} s") from None
        finally:
            self._num_loading -= 1

    async def _warm(self, width: Width, bucket: int) -> bool:
        return await self._possible(self._calibrate(width, bucket), f"run batches of {bucket} at width {width}")

    async def _possible(self, work: Awaitable[None], what: str) -> bool:
        """False when the device cannot; what was warmed before stays in use."""
        try:
            await work
        except (EngineHung, DeviceLost):
            raise
        except DeviceOutOfMemory as error:
            log.warning("no memory to %s: %s", what, error)
            return False
        except Exception:
            log.exception("the engine cannot %s: going on without", what)
            return False
        return True

    def drop_all(self, why: str) -> None:
        """Tell everyone who waits that there will be no answer."""
        for job in self._queue.drop_all():
            _settle(job, Unavailable(why))

    def close(self) -> None:
        self._device.close()
        self._loaders.shutdown(wait=False, cancel_futures=True)
        self._engine.close()

    def _take(self, decision: Decision) -> tuple[list[Job], list[Job]]:
        """Those to run and those to refuse. Who was settled this very moment still stands in the queue: not to run."""
        taken = self._queue.take([*decision.batch, *decision.shed])
        batch, refused = taken[: len(decision.batch)], taken[len(decision.batch) :]
        return [job for job in batch if not job.answer.done()], refused

    async def _run(self, jobs: Sequence[Job], decision: Decision, errand: Errand, profiled_s: float) -> None:
        """Raises EngineHung when there is nothing more to be hoped for."""
        try:
            ran = await self._device.result(errand)
        except (EngineHung, DeviceLost) as error:
            self._fail(jobs, str(error))
        except DeviceOutOfMemory as error:
            self._retry_smaller(jobs, decision.width, error)
        except Exception as error:
            log.exception("the engine failed on a batch of %d at width %s", len(jobs), decision.width)
            self._failures += 1
            for job in jobs:
                _settle(job, EngineFailed("The engine failed on this batch; the cause was logged."))
            if self._failures >= MAX_FAILURES:
                self._fail((), f"{MAX_FAILURES} batches in a row raised {type(error).__name__}")
        else:
            self._failures = 0
            self._record(jobs, decision, ran, profiled_s, errand.median_s)
            for job, row in zip(jobs, ran.probabilities, strict=True):
                _settle(
                    job,
                    Answer(
                        row,
                        decision.width,
                        len(jobs),
                        ran.began - job.queued_at,
                        ran.seconds,
                        ran.ended,
                        decision.predicted_s,
                    ),
                )

    async def _measure(self, pixels: NDArray[np.uint8], width: Width, expected_s: float | None = None) -> float:
        """Seconds that a run for nobody takes, by default a first one. Raises EngineHung, or what the engine raises."""
        await self._device.places.acquire()
        patience_s = self._patience_s(FIRST_RUN_S if expected_s is None else expected_s)
        busy_s = expected_s or 0.0  # nobody is refused for what is not known
        errand = self._device.hand_over(pixels, width, median_s=busy_s, p99_s=busy_s, patience_s=patience_s)
        return (await self._device.result(errand)).seconds

    def _patience_s(self, expected_s: float) -> float:
        """What is being loaded may hold the device for a while: a run that waits for it does not hang."""
        return max(LOADING_HANG_S if self._num_loading else MIN_HANG_S, HANG_FACTOR * expected_s)

    async def _calibrate(self, width: Width, batch: int) -> None:
        """Warm one cell and measure it on the path that requests take, letting them through between runs."""
        pixels = np.zeros((batch, *self._image_shape), np.uint8)
        last_s = await self._measure(pixels, width)
        seconds = self._remembered(width, batch)
        if seconds:
            last_s = await self._measure(pixels, width, last_s)
            if not 1 / SURPRISE < last_s / median(seconds) < SURPRISE:
                seconds = []
        self.measured_anew |= not seconds
        while len(seconds) < MIN_CALIBRATION_RUNS or (len(seconds) < CALIBRATION_RUNS and sum(seconds) < CALIBRATION_S):
            await self._change_width(width)
            last_s = await self._measure(pixels, width, last_s)
            seconds.append(last_s)
        self._profile.record(width, batch, seconds)

    async def _change_width(self, width: Width) -> None:
        """Run another one than ``width``, as traffic would: the same batch over and over is up to a third faster."""
        other = next((other for other in self._loaded if other != width), None)
        if other is None:
            await asyncio.sleep(0)
        else:
            expected_s = self._profile.p50(other, 1) if self._profile.ready(other) else None
            await self._measure(np.zeros((1, *self._image_shape), np.uint8), other, expected_s)

    def _retry_smaller(self, jobs: Sequence[Job], width: Width, error: DeviceOutOfMemory) -> None:
        """Back into the queue, and the cell off the table: the policy will split the batch or narrow the width."""
        bucket = next(bucket for bucket in self._profile.buckets if bucket >= len(jobs))
        log.warning("no memory for %d images at width %s: %s", len(jobs), width, error)
        self._profile.withdraw(width, bucket)
        if not any(map(self._profile.ready, self._profile.widths)):
            self._fail(jobs, "no memory for a single image at any width")
        for job in jobs:
            if not job.answer.done():
                job.dispatched = False
                self._queue.put(job)
        if width not in self._winning_back or self._winning_back[width].done():
            self._winning_back[width] = asyncio.create_task(self._win_back(width))

    async def _win_back(self, width: Width) -> None:
        """Whoever took the memory may give it back. One task a width, until all of its cells are on offer again."""
        while self._profile.max_batch(width) < self._engine.max_batch:
            await asyncio.sleep(RETRY_MEMORY_S)
            try:
                if await self._can_load(width, self._engine.max_batch):
                    await self._warm_missing(width)
            except (EngineHung, DeviceLost) as error:
                self._give_up((), str(error))
                return

    async def _warm_missing(self, width: Width) -> None:
        for bucket in self._profile.buckets:
            if self._profile.cell(width, bucket) is None and not await self._warm(width, bucket):
                return

    def _record(self, jobs: Sequence[Job], decision: Decision, ran: Ran, profiled_s: float, median_s: float) -> None:
        """What a batch tells of the machine; when it was decided on, it should have taken ``median_s``."""
        now = time.monotonic()
        if not self._num_loading and self._monitor.calm(now):  # a wait, or a neighbour's doing, would stay in it
            self._profile.record(decision.width, len(jobs), [ran.seconds])
        self._monitor.ran(ran.seconds, ran.idle_s, now - ran.ended, profiled_s, decision.predicted_s, now)
        wasted = sum(job.answer.done() or job.terms.deadline < now for job in jobs) / len(jobs)
        self._metrics.engine_seconds.labels("wasted").inc(wasted * ran.seconds)
        self._metrics.engine_seconds.labels("answered").inc((1 - wasted) * ran.seconds)
        self._metrics.engine_seconds.labels("idle").inc(ran.idle_s)
        self._metrics.prediction_ratio.observe(ran.seconds / median_s)
        self._metrics.batches.labels(str(ran.seconds <= decision.predicted_s).lower()).inc()
        self._metrics.batch_size.observe(len(jobs))
        self._metrics.width_selected.labels(str(decision.width)).inc(len(jobs))

    def _fail(self, jobs: Sequence[Job], why: str) -> NoReturn:
        """No more batches. Raises EngineHung."""
        self._give_up(jobs, why)
        raise EngineHung(why)

    def _give_up(self, jobs: Sequence[Job], why: str) -> None:
        """Everyone who waits hears so, and the process leaves for its supervisor to restart."""
        log.error("the engine failed: %s", why)
        self._lifecycle.fail(why)
        for job in jobs:
            _settle(job, Unavailable(RESTARTING))
        self.drop_all(RESTARTING)


def _forget_none(jobs: Sequence[Job], run: asyncio.Task[None]) -> None:
    """Whatever ended a batch's run, perhaps before it began, those who were taken from the queue for it hear so."""
    if run.cancelled() or run.exception() is not None:
        for job in jobs:
            _settle(job, Unavailable(RESTARTING))


def _settle(job: Job, outcome: Answer | RequestError) -> None:
    """Give the job its answer, unless it expired or its client left meanwhile."""
    if job.answer.done():
        return
    if isinstance(outcome, Answer):
        job.answer.set_result(outcome)
    else:
        job.answer.set_exception(outcome)
