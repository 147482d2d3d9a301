"""The driver: form a batch, decide, run, settle, record. One device, one engine thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from scala_model.width import Width
from server.admission import Admission
from server.engine.contract import Engine
from server.errors import EngineFailed, RequestError, Unavailable
from server.latency_profile import LatencyProfile
from server.lifecycle import Lifecycle
from server.load_monitor import LoadMonitor
from server.metrics import Metrics
from server.policies import Policy
from server.request_queue import RequestQueue
from server.types import Answer, Decision, Job, Probabilities

MIN_CALIBRATION_RUNS, CALIBRATION_RUNS, CALIBRATION_S = 3, 20, 2.0  # of a cell; a slow one is refined by traffic
FIRST_RUN_S = 6.0  # a cell's first run may compile or allocate: it is given ten times as long
MIN_HANG_S, HANG_FACTOR = 2.0, 10.0
RESTARTING = "The engine failed and the server is restarting; try again in a second."
MAX_FAILURES = 3  # in a row; then the engine is taken for poisoned
log = logging.getLogger("scala.serve")


class EngineHung(Exception):
    """The engine has not come back in ten times its p99."""


class ServeLoop:
    """Owns the device. ``start`` loads and warms the engine; ``serve`` runs until cancelled or the engine fails."""

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        queue: RequestQueue,
        profile: LatencyProfile,
        monitor: LoadMonitor,
        admission: Admission,
        lifecycle: Lifecycle,
        metrics: Metrics,
        image_size: int,
    ) -> None:
        self._engine, self._policy, self._queue, self._profile = engine, policy, queue, profile
        self._monitor, self._admission, self._lifecycle, self._metrics = monitor, admission, lifecycle, metrics
        self._image_shape = (image_size, image_size, 3)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._turn = asyncio.Lock()
        self._failures = 0

    async def serve(self) -> None:
        while True:
            await self._queue.wait()
            now = time.monotonic()
            self._queue.postpone_overdue(now)
            decision = self._policy(self._queue.view(), self._monitor.load(now), self._profile, now)
            jobs, refused = self._take(decision)
            for job in refused:
                _settle(job, self._admission.shed("Even the narrowest width would be late"))
            if jobs:
                log.debug("%s for %d of %d waiting", decision, len(jobs), len(jobs) + len(self._queue))
                await self._run(jobs, decision)

    async def start(self) -> None:
        """Load the engine and warm every cell; ready as soon as the narrowest and the widest can run one image."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.load)
        widths = self._profile.widths
        for width in (widths[0], widths[-1]):
            await self._calibrate(width, 1)
        self._lifecycle.started = True
        log.info("ready")
        growing = list(widths)
        for bucket in self._profile.buckets:
            growing = [width for width in growing if await self._warmed(width, bucket)]
        log.info("warmed: %s", {str(width): self._profile.max_batch(width) for width in widths})

    async def _warmed(self, width: Width, bucket: int) -> bool:
        """Warm a cell. False when the device cannot run it, for want of memory; what was warmed before stays in use."""
        try:
            if self._profile.cell(width, bucket) is None:
                await self._calibrate(width, bucket)
        except EngineHung:
            raise
        except Exception:
            log.exception("width %s cannot run batches of %d: leaving it at smaller ones", width, bucket)
            return False
        return True

    def drop_all(self, why: str) -> None:
        """Tell everyone who waits that there will be no answer."""
        for job in self._queue.drop_all():
            _settle(job, Unavailable(why))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._engine.close()

    def _take(self, decision: Decision) -> tuple[list[Job], list[Job]]:
        """Those to run and those to refuse. Who was settled this very moment still stands in the queue: not to run."""
        taken = self._queue.take([*decision.batch, *decision.shed])
        batch, refused = taken[: len(decision.batch)], taken[len(decision.batch) :]
        return [job for job in batch if not job.answer.done()], refused

    async def _run(self, jobs: Sequence[Job], decision: Decision) -> None:
        started = time.monotonic()
        for job in jobs:
            job.dispatched = True
        profiled_s = self._profile.p50(decision.width, len(jobs))
        self._admission.device_free_at = started + decision.predicted_s + self._monitor.hop.value_s(started)
        try:
            probabilities, handed_over, ran_from, ran_until = await self._on_device(
                np.stack([job.pixels for job in jobs]), decision.width, decision.predicted_s
            )
        except EngineHung as error:
            self._fail(jobs, str(error))
        except Exception as error:
            log.exception("the engine failed on a batch of %d at width %s", len(jobs), decision.width)
            self._failures += 1
            for job in jobs:
                _settle(job, EngineFailed("The engine failed on this batch; the cause was logged."))
            if self._failures >= MAX_FAILURES:
                self._fail((), f"{MAX_FAILURES} batches in a row raised {type(error).__name__}")
        else:
            self._failures = 0
            hop_s = time.monotonic() - handed_over - (ran_until - ran_from)
            self._record(jobs, decision, ran_until - ran_from, hop_s, profiled_s)
            for job, row in zip(jobs, probabilities, strict=True):
                answer = Answer(
                    row, decision.width, len(jobs), ran_from - job.queued_at, ran_until - ran_from, ran_until
                )
                _settle(job, answer)
        finally:
            self._admission.device_free_at = time.monotonic()

    async def _on_device(
        self, pixels: NDArray[np.uint8], width: Width, predicted_s: float
    ) -> tuple[Probabilities, float, float, float]:
        """Run on the engine's thread; the result, and when it was handed over, began and ended. Raises EngineHung."""
        async with self._turn:  # so that the wait for a calibration run is not taken for a hang
            handed_over = time.monotonic()
            future = asyncio.get_running_loop().run_in_executor(self._thread, _timed, self._engine, pixels, width)
            try:
                async with asyncio.timeout(max(MIN_HANG_S, HANG_FACTOR * predicted_s)):
                    probabilities, ran_from, ran_until = await asyncio.shield(future)
                    return probabilities, handed_over, ran_from, ran_until
            except TimeoutError:
                raise EngineHung(f"no answer in {max(MIN_HANG_S, HANG_FACTOR * predicted_s):.1f} s") from None

    async def _calibrate(self, width: Width, batch: int) -> None:
        """Warm one cell and measure it on the path that requests take, letting them through between runs."""
        pixels = np.zeros((batch, *self._image_shape), np.uint8)
        _, _, started, ended = await self._on_device(pixels, width, FIRST_RUN_S)
        seconds: list[float] = []
        while len(seconds) < MIN_CALIBRATION_RUNS or (len(seconds) < CALIBRATION_RUNS and sum(seconds) < CALIBRATION_S):
            await asyncio.sleep(0)
            self._admission.device_free_at = time.monotonic() + ended - started
            _, _, started, ended = await self._on_device(pixels, width, ended - started)
            seconds.append(ended - started)
        self._profile.record(width, batch, seconds)

    def _record(self, jobs: Sequence[Job], decision: Decision, seconds: float, hop_s: float, profiled_s: float) -> None:
        now = time.monotonic()
        self._monitor.ran(seconds, hop_s, profiled_s, decision.predicted_s, now)
        self._profile.record(decision.width, len(jobs), [seconds / self._monitor.slowdown(now)])
        self._metrics.batch_size.observe(len(jobs))
        self._metrics.width_selected.labels(str(decision.width)).inc(len(jobs))

    def _fail(self, jobs: Sequence[Job], why: str) -> None:
        """No more batches: everyone who waits hears so, and the process leaves for its supervisor to restart."""
        log.error("the engine failed: %s", why)
        self._lifecycle.fail(why)
        for job in jobs:
            _settle(job, Unavailable(RESTARTING))
        self.drop_all(RESTARTING)
        raise EngineHung(why)


def _timed(engine: Engine, pixels: NDArray[np.uint8], width: Width) -> tuple[Probabilities, float, float]:
    started = time.monotonic()
    probabilities = engine.run(pixels, width)
    if len(probabilities) != len(pixels):
        raise RuntimeError(f"the engine returned {len(probabilities)} rows for {len(pixels)} images")
    return probabilities, started, time.monotonic()


def _settle(job: Job, outcome: Answer | RequestError) -> None:
    """Give the job its answer, unless it expired or its client left meanwhile."""
    if job.answer.done():
        return
    if isinstance(outcome, Answer):
        job.answer.set_result(outcome)
    else:
        job.answer.set_exception(outcome)
