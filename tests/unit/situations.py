"""Queues, a profile and plans for the tests of what decides. Time is 0 now; budgets and latencies are in milliseconds.

The profile, p50 = p99, of which the last column is the time per image of a batch of four:

    width 0.25 (accuracy 0.5):  10, 12, 16 ms for 1, 2, 4 images:   4 ms
    width 0.5  (accuracy 0.6):  20, 24, 32 ms                       8 ms
    width 1    (accuracy 0.7):  40, 48, 64 ms                      16 ms
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.policies.plan import LEVELS, SLOWDOWNS, Plan, make_plan
from server.types import Load, QueueView

NARROW, MIDDLE, WIDE = Width(0.25), Width(0.5), Width(1.0)
ALL = (NARROW, MIDDLE, WIDE)
MEASURED = {NARROW: 0.5, MIDDLE: 0.6, WIDE: 0.7}
BATCH_MS = {1: 40.0, 2: 48.0, 4: 64.0}  # at full width; others take their share
IDLE = Load()
Image = tuple[float, tuple[Width, ...]]  # by when, in seconds, and the widths that it allows


def make_profile(samples: int = 20, widths: Sequence[Width] = ALL) -> LatencyProfile:
    """With fewer than 20 samples a cell's p99 is 1.5 x its p50."""
    profile = LatencyProfile(MEASURED, 4)
    for width in widths:
        for batch, ms in BATCH_MS.items():
            profile.record(width, batch, [float(width) * ms / 1000] * samples)
    return profile


PROFILE = make_profile()


def due(ms: float, count: int = 1, *, widths: tuple[Width, ...] = ALL) -> list[Image]:
    return [(ms / 1000, widths)] * count


def queue_of(*groups: Sequence[Image]) -> QueueView:
    """In the order of their deadlines, equals as they are given."""
    images = sorted(chain(*groups), key=lambda image: image[0])
    widths = [widths for _, widths in images]
    return QueueView([instant for instant, _ in images], widths, Counter(widths))


def plan_for(profile: LatencyProfile, *budgets_ms: float, max_waiting: int = 64) -> Plan:
    seconds = [[(row.batch, row.p50_s) for row in profile.rows(width)] for width in profile.widths]
    return make_plan(seconds, list(profile.accuracy.values()), [ms / 1000 for ms in budgets_ms], max_waiting)


def plan_that_ranks(*actions: tuple[int, int, float]) -> Plan:
    """Whatever the rate and however many wait: these (index of the width, images, worth), the best first."""
    widths, sizes, worth = zip(*actions, strict=True)
    shape = (len(SLOWDOWNS), LEVELS, 1, len(actions))
    return Plan(
        lowest_rate=np.ones(len(SLOWDOWNS)),
        state_of=np.zeros(1, np.int64),
        actions=np.array([widths, sizes]).T,
        order=np.broadcast_to(np.arange(len(actions)), shape),
        worth=np.broadcast_to(np.array(worth, float), shape),
    )
