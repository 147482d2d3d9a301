"""What one running server is made of; built once by ``app.py`` and read by the routes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from scala_model.checkpoint import Checkpoint
from scala_model.width import Width
from server.admission import Admission
from server.decision_log import DecisionLog
from server.decode import ImageDecoder, Received
from server.device import Device
from server.errors import RequestError
from server.large_images import LargeImages
from server.latency_profile import LatencyProfile
from server.lifecycle import Lifecycle
from server.load_monitor import LoadMonitor, full_width_demand
from server.metrics import Metrics
from server.oip.statistics import BatchTally
from server.planner import Planner
from server.policies import Policy
from server.pulse import Pulse
from server.quote import QuoteBook
from server.request_queue import RequestQueue
from server.schemas import EffectiveSettings
from server.serve_loop import RESTARTING, ServeLoop
from server.types import SMALL_BYTES, Encoded, Job, Pixels, Raster, Terms, Timed

if TYPE_CHECKING:
    from server.spans import Tracer

# For one image: the slowest that is allowed took 4 s.
DECODER_PATIENCE_S = 60.0
log = logging.getLogger("scala.serve")

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True)
class Services:
    """The parts, and the few notes that routes make of what happens."""

    settings: EffectiveSettings
    checkpoint: Checkpoint
    lifecycle: Lifecycle
    metrics: Metrics
    profile: LatencyProfile
    monitor: LoadMonitor
    queue: RequestQueue
    admission: Admission
    device: Device
    serve_loop: ServeLoop
    policy: Policy
    planner: Planner | None
    decision_log: DecisionLog | None
    quotes: QuoteBook
    pulse: Pulse
    decoder: ImageDecoder
    decoders: ThreadPoolExecutor
    decoder_turns: asyncio.Semaphore
    large_images: LargeImages  # half as many
    labels: tuple[str, ...]
    measured_accuracy: dict[Width, float | None]
    tracer: Tracer | None
    batches: BatchTally = field(default_factory=BatchTally)

    async def decode(self, received: Received) -> Pixels:
        """A small image at once, others in the bounded pool. Raises what ``ImageDecoder`` raises, or was received.

        A 64 x 64 JPEG took 0.2 ms in place and 0.4 by way of a thread on an idle server; under overload, with threads
        waiting for the interpreter's lock, 0.4 and 20. A large image takes much memory and up to seconds, so at
        most every second thread decodes one, and what it takes is not expected of others.
        """
        if isinstance(received, RequestError):
            raise received
        started, way = time.monotonic(), self.monitor.small
        try:
            if (pixels := self.decoder.if_small(received)) is not None:
                return pixels
            way = self.monitor.large
            found = await self._in_pool(1, self.decoder.unless_large, received)
        finally:
            now = time.monotonic()
            way.observe(now - started, now)
        return await self._decode_large(received, found) if isinstance(found, int) else found

    async def read(self, num_bytes: int, work: Callable[[*Ts], T], *given: *Ts) -> T:
        """What ``work`` makes of so many bytes of a body: at once of few, else in a decoder's thread."""
        return work(*given) if num_bytes <= SMALL_BYTES else await self._in_pool(0, work, *given)

    async def _in_pool(self, num_images: int, work: Callable[[*Ts], T], *given: *Ts) -> T:
        future = await self._started(num_images, work, *given)
        return await asyncio.shield(future)  # a thread cannot be stopped: its turn ends when it does

    async def _decode_large(self, received: Encoded | Raster, num_bytes: int) -> Pixels:
        await self.large_images.acquire(num_bytes)
        try:
            future = await self._started(1, self.decoder, received)
        except BaseException:
            self.large_images.release(num_bytes)
            raise
        future.add_done_callback(lambda _: self.large_images.release(num_bytes))
        return await asyncio.shield(future)

    async def _started(self, num_images: int, work: Callable[[*Ts], T], *given: *Ts) -> asyncio.Future[T]:
        """A body waits here for a decoder, not in the pool, which would keep it when its request has long expired."""
        self.admission.preparing += num_images
        try:
            await self.decoder_turns.acquire()
        except BaseException:
            self.admission.preparing -= num_images
            raise
        loop = asyncio.get_running_loop()
        watchdog = loop.call_later(DECODER_PATIENCE_S, self._decoder_hangs)
        future = loop.run_in_executor(self.decoders, work, *given)
        future.add_done_callback(partial(self._decoder_is_free, num_images, watchdog))
        return future

    def _decoder_hangs(self) -> None:
        """Native code cannot be stopped, and would keep its turn and its memory: like a hung engine it ends us."""
        why = f"a decoder has not come to an end in {DECODER_PATIENCE_S:.0f} s"
        log.error("%s: leaving", why)
        self.lifecycle.fail(why)
        self.serve_loop.drop_all(RESTARTING)

    def _decoder_is_free(self, num_images: int, watchdog: asyncio.TimerHandle, future: asyncio.Future[Any]) -> None:
        watchdog.cancel()
        self.admission.preparing -= num_images
        self.decoder_turns.release()
        if not future.cancelled():
            future.exception()  # seen, even if nobody waits for it any more

    def arrived(self, terms: Terms) -> None:
        """An image of a well-formed request came in; a pinned width counts with its own share of device time."""
        widest, ready = self.profile.widths[-1], self.profile.ready
        share = 1.0
        if len(terms.widths) == 1 and ready(terms.widths[0]) and ready(widest):
            share = self.profile.p50(terms.widths[0], 1) / self.profile.p50(widest, 1)
        self.monitor.arrived(1, terms.order_by - terms.arrival, share, time.monotonic())

    def answered(self, answers: Sequence[Timed]) -> None:
        self.batches.add(answers)
        for timed in answers:
            answer = timed.answer
            self.metrics.stage_duration.labels("decode").observe(timed.decode_s)
            self.metrics.stage_duration.labels("queue").observe(answer.queue_s)
            self.metrics.stage_duration.labels("inference").observe(answer.inference_s)
            self.monitor.answered(self.profile.accuracy[answer.width])

    def settled(self, terms: Terms, jobs: Sequence[Job] | None, outcome: str) -> None:
        """A request is over; ``jobs`` are those of its images that were queued, None of one that never came in whole.

        What became of those that named a budget is what plans and quotes are learned from, unless it was the caller's
        doing: he left, or his upload took too long.
        """
        received, shed, now = jobs is not None, outcome == "shed", time.monotonic()
        given = self._given_accuracy(jobs or ())
        if outcome in ("met", "missed"):
            self.pulse.answered(now - terms.arrival, now)
        if outcome == "met" and given is not None:
            self.metrics.expected_correct.inc(given)
        if terms.order_by == terms.deadline and (received or shed) and outcome != "cancelled":
            in_time = outcome == "met"
            self.monitor.settled(self._worth(terms, given) if in_time else None, now)
            if jobs or (received and not shed):
                self.monitor.promises.add(in_time, now)
            self.quotes.ended(terms.deadline - terms.arrival, terms.arrival, in_time, now)

    def _given_accuracy(self, jobs: Sequence[Job]) -> float | None:
        """Mean expected accuracy of the images that were answered; None where none was."""
        given = [self.profile.accuracy[job.answer.result().width] for job in jobs if answered(job)]
        return sum(given) / len(given) if given else None

    def _worth(self, terms: Terms, given: float | None) -> float:
        """The accuracy that was given over the best that the request allows."""
        return 1.0 if given is None else given / max(self.profile.accuracy[width] for width in terms.widths)

    def expected_accuracy(self) -> float:
        """Of recent answers, smoothed; of the most accurate width before there was one."""
        seen = self.monitor.expected_accuracy
        return max(self.profile.accuracy.values()) if seen is None else seen

    def accuracy_debt(self) -> float:
        """Percentage points between the most accurate width and recent answers."""
        return 100 * (max(self.profile.accuracy.values()) - self.expected_accuracy())

    def full_width_demand(self) -> float:
        return full_width_demand(self.monitor, self.profile, time.monotonic())


def answered(job: Job) -> bool:
    return job.answer.done() and not job.answer.cancelled() and job.answer.exception() is None
