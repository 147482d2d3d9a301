"""Traffic, device and profile of which schedules can be worked out by hand.

Instants and durations are in ticks of 1/1024 s, so that their sums are exact. The profile, p50 = p99:

    width 0.25 (position 0, accuracy 0.5):  10, 12, 16 ticks for 1, 2, 4 images; 14 for 3
    width 0.5  (position 1, accuracy 0.6):  20, 24, 32; 28
    width 1    (position 2, accuracy 0.7):  40, 48, 64; 56
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.simulation.simulator import Batch, Frontend, Outcome, Scheduler, simulate
from server.simulation.workload import Workload

TICK_S = 1 / 1024
IDEAL = Frontend()
PREDICTED = 17  # ticks of any batch, by a script
NARROW, MIDDLE, WIDE = range(3)
TICKS = ((0, 10, 12, 16, 16), (0, 20, 24, 32, 32), (0, 40, 48, 64, 64))


def make_profile() -> LatencyProfile:
    profile = LatencyProfile({Width(0.25): 0.5, Width(0.5): 0.6, Width(1): 0.7}, 4)
    for width, ticks in zip(profile.widths, TICKS, strict=True):
        for batch in (1, 2, 4):
            profile.record(width, batch, [ticks[batch] * TICK_S] * 20)
    return profile


class Exact:
    """A device as the profile says, or as many times slower as is told of each of its first batches."""

    def __init__(self, *factors: float) -> None:
        self._factors = list(factors)

    def seconds(self, width: int, images: int, now: float, chance: random.Random) -> float:
        return TICKS[width][images] * TICK_S * (self._factors.pop(0) if self._factors else 1)


def frontend(decoders: int = 1, decode: float = 0, hop: float = 0, respond: float = 0) -> Frontend:
    """Durations in ticks."""
    return Frontend(decoders, decode * TICK_S, hop * TICK_S, respond * TICK_S)


def traffic(*requests: tuple[float, float]) -> Workload:
    """Requests as (arrival, budget), in ticks."""
    arrivals, budgets = np.array(requests, float).T * TICK_S
    return Workload("by hand", arrivals, budgets, np.zeros(len(requests), np.int64))


def played(
    scheduler: Scheduler, *requests: tuple[float, float], device: Exact | None = None, front: Frontend = IDEAL
) -> tuple[list[tuple[float, int, int]], list[float | str]]:
    """The batches as (start, width, images), and of each request when it was answered or what became of it."""
    outcome = simulate(traffic(*requests), scheduler, device or Exact(), front)
    return [(run.started_s / TICK_S, run.width, run.images) for run in outcome.runs], fates(outcome)


def fates(outcome: Outcome) -> list[float | str]:
    ends = zip(outcome.finished_s.tolist(), outcome.refused.tolist(), strict=True)
    return ["refused" if refused else "dropped" if end != end else end / TICK_S for end, refused in ends]


class Scripted:
    """Runs what waits, in the order of arrival and one at a time; every question it is asked is in ``asked``."""

    def __init__(self, refuse: Sequence[int] = (), wait_until: float = 0, most: int = 1) -> None:
        self._refuse, self._wait_until, self._most = refuse, wait_until * TICK_S, most
        self.asked: list[tuple[object, ...]] = []
        self._waiting: list[int] = []

    def start(self, arrivals_s: Sequence[float], deadlines_s: Sequence[float]) -> None:
        self.asked.append(("start", [s / TICK_S for s in arrivals_s], [s / TICK_S for s in deadlines_s]))

    def admits(self, image: int, now: float, device_free_at: float) -> bool:
        self.asked.append(("admits", image, now / TICK_S, device_free_at / TICK_S))
        return image not in self._refuse

    def queued(self, image: int, now: float) -> None:
        self.asked.append(("queued", image, now / TICK_S))
        self._waiting.append(image)

    def next_batch(self, now: float) -> Batch | float | None:
        self.asked.append(("next", now / TICK_S))
        if not self._waiting:
            return None
        if now < self._wait_until:
            return self._wait_until
        images, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
        return Batch(NARROW, images, PREDICTED * TICK_S)

    def ran(self, batch: Batch, seconds: float, now: float) -> None:
        self.asked.append(("ran", *batch.images, seconds / TICK_S, now / TICK_S))
