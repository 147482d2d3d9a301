"""A server in simulated time: decoders, one queue, one device. Every random draw comes from one seed."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from server.simulation.workload import Workload

QUEUED, FREE, WAKE = range(3)  # the order of what happens at one instant, behind arrivals


@dataclass(frozen=True, slots=True)
class Batch:
    """What a scheduler runs: positions in the workload, at the width of this index. ``predicted_s``: its p99."""

    width: int
    images: Sequence[int]
    predicted_s: float = 0.0


class Scheduler(Protocol):
    """Decides for one run. Images are positions in the workload; instants are seconds from its start."""

    def start(self, arrivals_s: Sequence[float], deadlines_s: Sequence[float]) -> None: ...

    def admits(self, image: int, now: float, device_free_at: float) -> bool:
        """Asked when its request arrives and, if it was let in, again when it is decoded. False: refused.

        ``device_free_at``: since when the device is free, or when it should be by what was predicted.
        """
        ...

    def queued(self, image: int, now: float) -> None:
        """It is decoded and waits."""
        ...

    def next_batch(self, now: float) -> Batch | float | None:
        """What to run, now that the device is free; or a later instant at which to ask again. It is asked again anyway
        when another image is queued."""
        ...

    def ran(self, batch: Batch, seconds: float, now: float) -> None: ...


class Device(Protocol):
    """How long things take, in seconds."""

    def seconds(self, width: int, images: int, now: float, chance: random.Random) -> float: ...


@dataclass(frozen=True, slots=True)
class Frontend:
    """What happens to an image before and after the device: ``decoders`` decode one at a time in ``decode_s``; a batch
    takes ``hop_s`` to the device, and an answer ``respond_s`` from it. Raises ValueError where none of it can be."""

    decoders: int = 1
    decode_s: float = 0.0
    hop_s: float = 0.0
    respond_s: float = 0.0

    def __post_init__(self) -> None:
        if self.decoders < 1:
            raise ValueError(f"{self.decoders} decoders decode nothing: give 1 or more")
        for name, seconds in (("decode_s", self.decode_s), ("hop_s", self.hop_s), ("respond_s", self.respond_s)):
            if not 0 <= seconds < math.inf:
                raise ValueError(f"{name} is {seconds}: give seconds, 0 or more")


@dataclass(frozen=True, slots=True)
class Run:
    """A batch that the device ran: from when, how long, how long was predicted (p99), the width's index, how many."""

    started_s: float
    seconds: float
    predicted_s: float
    width: int
    images: int


@dataclass(frozen=True)
class Outcome:
    """Of each arrival (N): when it was answered (nan: never), its width's index (-1: none), whether it was refused."""

    finished_s: NDArray[np.float64]
    width: NDArray[np.int8]
    refused: NDArray[np.bool_]
    runs: list[Run] = field(repr=False)


def simulate(
    workload: Workload, scheduler: Scheduler, device: Device, frontend: Frontend = Frontend(), *, seed: int = 0
) -> Outcome:
    """Play a workload. An image that is never run is neither answered nor refused."""
    simulation = Simulation(scheduler, device, frontend, seed)
    simulation.add(workload.arrivals_s.tolist(), workload.deadlines_s.tolist())
    simulation.play()
    return simulation.outcome()


class Simulation:
    """Requests that are played up to an instant, and then those that were added since: what is to come may depend on
    what has been. ``runs`` are the batches that were begun."""

    def __init__(self, scheduler: Scheduler, device: Device, frontend: Frontend, seed: int) -> None:
        self._scheduler, self._device, self._frontend = scheduler, device, frontend
        self._chance = random.Random(seed)
        self._arrivals: list[float] = []
        self._deadlines: list[float] = []
        self._finished: list[float] = []
        self._width: list[int] = []
        self._refused: list[bool] = []
        self.runs: list[Run] = []
        self._events: list[tuple[float, int, int]] = []
        self._next_arrival = 0
        self._running: Batch | None = None
        self._free_at = 0.0  # as far as a scheduler can know
        self._wake_at = -1.0
        self._decoder_free_at = [0.0] * frontend.decoders

    def add(self, arrivals_s: Sequence[float], deadlines_s: Sequence[float]) -> None:
        """More requests, in the order of their arrival, none of them before what was played. The scheduler is started
        with the first, and keeps lists that become longer."""
        first = not self._arrivals
        self._arrivals += arrivals_s
        self._deadlines += deadlines_s
        count = len(arrivals_s)
        self._finished += [np.nan] * count
        self._width += [-1] * count
        self._refused += [False] * count
        if first:
            self._scheduler.start(self._arrivals, self._deadlines)

    def play(self, until_s: float = math.inf) -> None:
        """What happens before that instant."""
        arrivals, events, count = self._arrivals, self._events, len(self._arrivals)
        handle: dict[int, Callable[[int, float], None]] = {QUEUED: self._queue, FREE: self._free, WAKE: self._wake}
        while events or self._next_arrival < count:
            if self._next_arrival < count and (not events or arrivals[self._next_arrival] <= events[0][0]):
                if arrivals[self._next_arrival] >= until_s:
                    return
                self._arrive(self._next_arrival, arrivals[self._next_arrival])
                self._next_arrival += 1
            else:
                if events[0][0] >= until_s:
                    return
                now, kind, image = heapq.heappop(events)
                handle[kind](image, now)

    def answers(self, first: int, end: int) -> tuple[Sequence[float], Sequence[int]]:
        """When these requests were answered (nan: not yet) and the index of the width, in the order of arrival."""
        return self._finished[first:end], self._width[first:end]

    def outcome(self) -> Outcome:
        return Outcome(np.array(self._finished), np.array(self._width, np.int8), np.array(self._refused), self.runs)

    def _arrive(self, image: int, now: float) -> None:
        if not self._scheduler.admits(image, now, self._free_at):
            self._refused[image] = True
            return
        decoder = heapq.heappop(self._decoder_free_at)
        decoded = max(now, decoder) + self._frontend.decode_s
        heapq.heappush(self._decoder_free_at, decoded)
        if decoded == now:
            self._queue(image, now)
        else:
            heapq.heappush(self._events, (decoded, QUEUED, image))

    def _queue(self, image: int, now: float) -> None:
        if self._frontend.decode_s and not self._scheduler.admits(image, now, self._free_at):
            self._refused[image] = True
            return
        self._scheduler.queued(image, now)
        if self._running is None:
            self._dispatch(now)

    def _wake(self, _: int, now: float) -> None:
        if self._running is None and now == self._wake_at:
            self._dispatch(now)

    def _free(self, _: int, now: float) -> None:
        batch, run = self._running, self.runs[-1]
        assert batch is not None
        self._running, self._free_at = None, now
        finished = run.started_s + self._frontend.hop_s + run.seconds + self._frontend.respond_s
        for image in batch.images:
            self._finished[image] = finished
            self._width[image] = batch.width
        self._scheduler.ran(batch, run.seconds, now)
        self._dispatch(now)

    def _dispatch(self, now: float) -> None:
        chosen = self._scheduler.next_batch(now)
        if isinstance(chosen, float):
            assert chosen > now, "time would stand still"
            self._wake_at = chosen
            heapq.heappush(self._events, (chosen, WAKE, 0))
        elif chosen is not None:
            assert chosen.images
            seconds = self._device.seconds(chosen.width, len(chosen.images), now, self._chance)
            self._running = chosen
            self.runs.append(Run(now, seconds, chosen.predicted_s, chosen.width, len(chosen.images)))
            self._free_at = now + self._frontend.hop_s + chosen.predicted_s
            heapq.heappush(self._events, (now + self._frontend.hop_s + seconds, FREE, 0))
