"""The oracle: a bound on the effective accuracy that any scheduler can reach, computed with the future known.

It is the exact optimum of a linear program that relaxes scheduling: an image may be served in fractions, at several
widths, with interruptions, at the cost per image of each width's best batch, whoever else is there to fill it. What
remains is that an image uses the device only between its arrival and its deadline, that the device has one second a
second, and that an image is worth no more than what one answer to it is.

It takes no solver, and time is cut into neither slots nor windows. What an image gains from d seconds of the device is
concave in d, a walk along the hull of the widths; and the seconds that all can have at once are a polymatroid, so that
it is optimal to hand them out in order of gain per second, the steepest steps of the hulls first (Edmonds 1970;
Federgruen and Groenevelt 1986). How many seconds all images together can use for steps down to some steepness is told
by earliest deadline first, as in matchings of convex bipartite graphs (Glover 1967).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.float64]
Step = tuple[float, float]  # of a hull: what a second gains, and how many seconds it takes


@dataclass(frozen=True, slots=True)
class Bound:
    """``effective_accuracy`` is a share of all arrivals. ``busy_s`` is what the device works to reach it."""

    effective_accuracy: float
    busy_s: float


def upper_bound(
    arrivals_s: ArrayLike, deadlines_s: ArrayLike, cost_s: ArrayLike, accuracy: ArrayLike, *, least_s: ArrayLike
) -> Bound:
    """What no scheduler exceeds, in expectation over the images, unless it knows which of them a width gets right.

    ``arrivals_s`` (N) and ``deadlines_s`` (N) are instants of one clock, in any order; an arrival may be told as late
    as the device can have the image. Of each width (X): ``cost_s`` is the device time of one image in the batch where
    that is least; ``least_s`` the least time from an arrival to an answer: a shorter budget rules the width out;
    ``accuracy`` the mean over the images, or 1 for a bound on attainment. For a noisy device, give its shortest times:
    medians bound only a device that keeps to them. Raises ValueError for numbers that describe no traffic or no widths.
    """
    arrivals, deadlines = _numbers(arrivals_s=arrivals_s, deadlines_s=deadlines_s)
    cost, accurate, least = _numbers(cost_s=cost_s, accuracy=accuracy, least_s=least_s)
    _check_widths(cost, accurate, least)

    images, widths = np.argsort(arrivals), np.argsort(least)
    arrivals, deadlines = arrivals[images], deadlines[images]
    # Added up as a schedule adds up, so that rounding rules out no width that one could use.
    num_usable = np.sum(arrivals[:, None] + least[widths] <= deadlines[:, None], axis=1)
    hulls = {int(n): _hull(cost[widths[:n]].tolist(), accurate[widths[:n]].tolist()) for n in np.unique(num_usable)}

    gained = busy_s = 0.0
    for slope in sorted({slope for hull in hulls.values() for slope, _ in hull}, reverse=True):
        wanted_s = {n: sum(seconds for gain, seconds in hull if gain >= slope) for n, hull in hulls.items()}
        before_s = busy_s
        busy_s = _most_busy_s(arrivals.tolist(), deadlines.tolist(), [wanted_s[n] for n in num_usable.tolist()])
        gained += slope * (busy_s - before_s)
    return Bound(gained / len(arrivals), busy_s)


def _hull(cost_s: Sequence[float], accuracy: Sequence[float]) -> list[Step]:
    """The concave hull of the widths, from no service to the most accurate width, each step flatter than the last."""
    steps: list[Step] = []
    spent_s = reached = 0.0
    while better := [(c, a) for c, a in zip(cost_s, accuracy, strict=True) if a > reached]:
        slope, next_reached, next_s = max(((a - reached) / (c - spent_s), a, c) for c, a in better)
        steps.append((slope, next_s - spent_s))
        spent_s, reached = next_s, next_reached
    return steps


def _most_busy_s(arrivals_s: Sequence[float], deadlines_s: Sequence[float], wanted_s: Sequence[float]) -> float:
    """The most that the device can work when each image wants some seconds of it between arrival and deadline.

    Arrivals ascend. The device works for the earliest deadline among those that wait, and an arrival may interrupt it.
    """
    busy_s = 0.0
    waiting: list[tuple[float, float]] = []  # deadline, seconds still wanted
    for (now, until), deadline, seconds in zip(pairwise([*arrivals_s, math.inf]), deadlines_s, wanted_s, strict=True):
        heapq.heappush(waiting, (deadline, seconds))
        while waiting and now < until:
            first_deadline, left_s = heapq.heappop(waiting)
            end = min(now + left_s, first_deadline, until)
            if end <= now:  # too late, or nothing wanted
                continue
            if end == until:
                heapq.heappush(waiting, (first_deadline, left_s - (end - now)))
            busy_s += end - now
            now = end
    return busy_s


def _numbers(**columns: ArrayLike) -> list[Numbers]:
    """Arrays (N), all as long. Raises ValueError where they are not, or hold what is no number."""
    arrays = {name: np.asarray(column, np.float64) for name, column in columns.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) > 1 or any(len(shape) != 1 or shape == (0,) for shape in shapes):
        told = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"the shapes are {told}: give one row each, equally long and not empty")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds {array[~np.isfinite(array)][0]}: give finite numbers")
    return list(arrays.values())


def _check_widths(cost_s: Numbers, accuracy: Numbers, least_s: Numbers) -> None:
    for cost, accurate, least in zip(cost_s.tolist(), accuracy.tolist(), least_s.tolist(), strict=True):
        if not 0 <= accurate <= 1:
            raise ValueError(f"an accuracy of {accurate:g}: give a share from 0 to 1")
        if not 0 < cost <= least:
            raise ValueError(
                f"an image takes {cost:g} s of a batch that takes {least:g} s: give a cost above 0 that is at most the "
                "least latency"
            )
