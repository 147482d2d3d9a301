"""The engine's one thread, and what it has in hand: the batch that runs, and one more that waits behind it.

The second place is what keeps the device busy. From a result to the next hand-over the event loop has other work to
do, a few milliseconds of it when many requests come in, and without a batch in hand the device would stand idle.
"""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from scala_model.width import Width
from server.engine.contract import Engine
from server.lifecycle import Lifecycle
from server.types import Probabilities

PLACES = 2
MAX_ROUNDING = 1e-3  # by which a row's sum may differ from 1


class EngineHung(Exception):
    """The engine has not come back in ten times its p99."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of a batch. It ran from ``began`` to ``ended``; ``idle_s`` before, the device was free and the batch
    could have been run."""

    probabilities: Probabilities
    began: float
    ended: float
    idle_s: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(slots=True, eq=False)
class Errand:
    """A batch in the device's hands. ``patience_s``: what it may take; ``limit`` rings at ``until``, when half of that
    is over, and again at its end."""

    median_s: float
    p99_s: float
    patience_s: float
    since: float
    until: float
    idle_s: float = 0.0
    running: asyncio.Future[tuple[Probabilities, float, float]] = field(init=False)
    limit: asyncio.Timeout | None = None
    half_over: bool = False

    def wait_until(self, when: float) -> None:
        """In the event loop's time. Nothing where nobody waits any more, or need not."""
        if self.limit is not None and not self.limit.expired() and not self.running.done():
            self.limit.reschedule(when)


class Device:
    """Runs one batch after the other. ``free_at`` is when it should have run all that it has in hand, ``free_by`` when
    it will have in 99 of 100 cases: instants that may have passed.

    Whoever has a ``place`` hands over and waits for the ``result``, which gives the place back; or does so himself.
    """

    def __init__(self, engine: Engine, lifecycle: Lifecycle, num_classes: int) -> None:
        self.engine, self._lifecycle, self._num_classes = engine, lifecycle, num_classes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self.places = asyncio.Semaphore(PLACES)
        self._in_hand: list[Errand] = []
        self._ended = 0.0  # the last run
        self._began = 0.0  # what runs, or its being handed over
        self.free_at = self.free_by = 0.0

    async def nearly_free(self, lead_s: float) -> None:
        """Return ``lead_s`` before it should have run all that it has in hand, or once it has."""
        if self._in_hand:
            patience_s = self.free_at - lead_s - time.monotonic()
            await asyncio.wait([errand.running for errand in self._in_hand], timeout=max(0.0, patience_s))

    def hand_over(
        self,
        pixels: NDArray[np.uint8],
        width: Width,
        *,
        median_s: float,
        p99_s: float,
        patience_s: float,
        since: float | None = None,
    ) -> Errand:
        """To be run as soon as the device is free, or behind the batch that runs.

        ``median_s`` and ``p99_s`` are what it should take, ``patience_s`` what it may take; ``since`` is when it could
        have begun, by default now. Raises EngineHung.
        """
        if self._lifecycle.failed is not None:
            self.places.release()
            raise EngineHung(self._lifecycle.failed)
        now = time.monotonic()
        if not self._in_hand:
            self._began = now
        errand = Errand(median_s, p99_s, patience_s, now if since is None else since, self._half(patience_s))
        errand.running = asyncio.get_running_loop().run_in_executor(self._thread, self._timed, pixels, width)
        errand.running.add_done_callback(lambda _: self._ran(errand))
        self._in_hand.append(errand)
        self._foresee()
        return errand

    async def result(self, errand: Errand) -> Ran:
        """Raises EngineHung, or what the engine raises."""
        try:
            probabilities, began, ended = await self._end_of(errand)
        except TimeoutError:
            if self._lifecycle.failed is None:
                self._lifecycle.fail(f"no answer in {errand.patience_s:.1f} s")
                for other in self._in_hand:  # which would wait in vain
                    if other is not errand:
                        other.wait_until(0)
            raise EngineHung(self._lifecycle.failed) from None
        finally:
            errand.limit = None  # nobody waits any more, though it may not have been run, or settled, yet
            self.places.release()
        return Ran(probabilities, began, ended, errand.idle_s)

    async def _end_of(self, errand: Errand) -> tuple[Probabilities, float, float]:
        """Raises TimeoutError when both halves of its patience are over.

        Two, because a process that was held still (a paused container, a machine that is moved) finds its timers
        overdue before its engine has had its turn. That costs the half in which it was; the engine has the other.
        """
        while True:
            try:
                async with asyncio.timeout(errand.until - time.monotonic()) as errand.limit:
                    return await asyncio.shield(errand.running)
            except TimeoutError:
                if errand.half_over or self._lifecycle.failed is not None:
                    raise
                errand.half_over, errand.until = True, self._half(errand.patience_s, errand)

    def _half(self, patience_s: float, errand: Errand | None = None) -> float:
        """When half of a batch's patience will be over, behind all of that of what runs before: the wait for that is
        not taken for a hang. It counts anew from its end."""
        ahead = takewhile(lambda other: other is not errand, self._in_hand)
        return time.monotonic() + sum(other.patience_s for other in ahead) + patience_s / 2

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _timed(self, pixels: NDArray[np.uint8], width: Width) -> tuple[Probabilities, float, float]:
        began = time.monotonic()
        probabilities = self.engine.run(pixels, width)
        _check(probabilities, (len(pixels), self._num_classes))
        return probabilities, began, time.monotonic()

    def _ran(self, errand: Errand) -> None:
        self._in_hand.remove(errand)
        self._began = time.monotonic()
        if not errand.running.cancelled() and errand.running.exception() is None:
            _, began, ended = errand.running.result()
            errand.idle_s = began - max(errand.since, self._ended)
            self._ended = self._began = ended
        for following in self._in_hand:
            following.half_over, following.until = False, time.monotonic() + following.patience_s / 2
            following.wait_until(asyncio.get_running_loop().time() + following.patience_s / 2)
        self._foresee()

    def _foresee(self) -> None:
        self.free_at = self._began + sum(errand.median_s for errand in self._in_hand)
        self.free_by = self.free_at + math.hypot(*(errand.p99_s - errand.median_s for errand in self._in_hand))


def _check(probabilities: Probabilities, shape: tuple[int, int]) -> None:
    """Raises RuntimeError for what is no probabilities: a class made up from it would pass for an answer.

    One bad row condemns its batch, whose other rows came from the same arithmetic.
    """
    if probabilities.shape != shape:
        raise RuntimeError(f"the engine returned {probabilities.shape} for {shape} probabilities")
    # Asked so that NaN, which is neither more nor less than anything, fails too.
    if not (probabilities.min() >= 0 and np.abs(probabilities.sum(1) - 1).max() <= MAX_ROUNDING):
        raise RuntimeError(f"what the engine returned for {len(probabilities)} images are no probabilities")
