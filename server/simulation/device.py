"""Devices in simulated time: measured latencies drawn anew, a noisy neighbour, a worker that is killed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from scala_model.width import Width
from server.latency_profile import LatencyProfile, buckets_up_to
from server.simulation.simulator import Batch, Frontend, Outcome, Scheduler

Cells = Mapping[tuple[Width, int], tuple[float, ...]]  # equally likely seconds of a batch of this size at this width


@dataclass(frozen=True, eq=False)
class Machine:
    """A network on a device. ``correct`` bool (N, X): whether image n is classified correctly at ``widths[x]``.

    ``about`` says where the figures are from. Machines of one ``digest`` are equal. Raises ValueError where a width
    lacks a batch size that another has.
    """

    name: str
    about: str
    widths: tuple[Width, ...]
    cells: Cells
    correct: NDArray[np.bool_]
    frontend: Frontend
    max_images: int = 256  # that may wait, whatever the policy

    def __post_init__(self) -> None:
        assert self.correct.shape == (len(self.correct), len(self.widths))
        for width, batch in ((width, batch) for width in self.widths for batch in buckets_up_to(self.max_batch)):
            if (width, batch) not in self.cells:
                raise ValueError(
                    f"{self.name} has no latency of {batch} images at width {width}: measure every width at 1, 2, 4, "
                    f"... {self.max_batch} images"
                )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Machine) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def max_batch(self) -> int:
        return max(batch for _, batch in self.cells)

    @cached_property
    def accuracy(self) -> NDArray[np.float64]:
        """Of each width (X)."""
        accuracy: NDArray[np.float64] = self.correct.mean(axis=0)
        return accuracy

    @cached_property
    def capacity(self) -> float:
        """Images a second of the device at the widest width, in the best batch: the unit of load."""
        return 1 / self.profile().seconds_per_image(self.widths[-1])

    @cached_property
    def digest(self) -> str:
        """Of all that results depend on."""
        told = repr((self.widths, sorted(self.cells.items()), self.frontend, self.max_images)).encode()
        return hashlib.sha256(told + self.correct.tobytes()).hexdigest()

    def profile(self) -> LatencyProfile:
        """What a server that has measured this device believes of it: a new one, since a server refines its own."""
        profile = LatencyProfile(dict(zip(self.widths, self.accuracy.tolist(), strict=True)), self.max_batch)
        for (width, batch), seconds in self.cells.items():
            profile.record(width, batch, seconds)
        return profile


class SimulatedDevice:
    """Draws a run's latency from the samples of its cell.

    A batch between two buckets takes a sample of the upper one, as much shorter as a latency profile says. Draws are
    independent of each other; ``slowdown`` of the instant multiplies them.
    """

    def __init__(self, machine: Machine, slowdown: Callable[[float], float] = lambda now: 1.0) -> None:
        self._slowdown = slowdown
        profile = machine.profile()
        self._samples = [
            [self._scaled(machine.cells, profile, width, batch) for batch in range(1, machine.max_batch + 1)]
            for width in machine.widths
        ]

    def seconds(self, width: int, images: int, now: float, chance: random.Random) -> float:
        samples = self._samples[width][images - 1]
        return samples[int(len(samples) * chance.random())] * self._slowdown(now)

    @staticmethod
    def _scaled(cells: Cells, profile: LatencyProfile, width: Width, batch: int) -> list[float]:
        bucket = next(bucket for bucket in profile.buckets if bucket >= batch)
        shorter = profile.p50(width, batch) / profile.p50(width, bucket)
        return [shorter * seconds for seconds in cells[width, bucket]]


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Somebody else's work on the machine: batches take ``factor`` times as long in [from_s, until_s)."""

    from_s: float
    until_s: float
    factor: float

    def slowdown(self, now: float) -> float:
        return self.factor if self.from_s <= now < self.until_s else 1.0


# -- a worker that is killed


@dataclass(frozen=True, slots=True)
class Kill:
    """The server dies at ``at_s`` and serves again ``for_s`` later, as a supervisor restarts it."""

    at_s: float
    for_s: float

    @property
    def back_at_s(self) -> float:
        return self.at_s + self.for_s

    def survivors(self, outcome: Outcome) -> Outcome:
        """The outcome without the answers of the batch that ran when the server died: nobody answers before it is back.

        That holds as long as it stays away for longer than a batch takes.
        """
        lost = (outcome.finished_s > self.at_s) & (outcome.finished_s < self.back_at_s)
        finished_s, width = np.where(lost, np.nan, outcome.finished_s), np.where(lost, -1, outcome.width)
        return Outcome(finished_s, width.astype(np.int8), outcome.refused, outcome.runs)


class Mortal:
    """A scheduler that is killed, and a new one that takes its place. What the first had in its queue is lost.

    Who comes in between is refused: there is nobody to connect to. A killed batch occupies the device until its end.
    """

    def __init__(self, make: Callable[[], Scheduler], kill: Kill) -> None:
        self._make, self._kill, self._scheduler = make, kill, make()
        self._reborn = False

    def start(self, arrivals_s: Sequence[float], deadlines_s: Sequence[float]) -> None:
        self._asked = arrivals_s, deadlines_s
        self._scheduler.start(*self._asked)

    def admits(self, image: int, now: float, device_free_at: float) -> bool:
        return self._lives(now, image) and self._scheduler.admits(image, now, device_free_at)

    def queued(self, image: int, now: float) -> None:
        if self._lives(now, image):
            self._scheduler.queued(image, now)

    def next_batch(self, now: float) -> Batch | float | None:
        return self._scheduler.next_batch(now) if self._lives(now) else None

    def ran(self, batch: Batch, seconds: float, now: float) -> None:
        if self._lives(now, batch.images[0]):
            self._scheduler.ran(batch, seconds, now)

    def _lives(self, now: float, image: int | None = None) -> bool:
        """Whether there is a server, and it is the one that ``image`` came to. Starts the new one in time."""
        if now < self._kill.at_s:
            return True
        if now >= self._kill.back_at_s and not self._reborn:
            self._reborn, self._scheduler = True, self._make()
            self._scheduler.start(*self._asked)
        return self._reborn and (image is None or self._asked[0][image] >= self._kill.back_at_s)
