"""Deadline arithmetic on a queue ordered by deadline: what one device can still finish in time. Instants in seconds."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.types import Load, QueueView

Sizes = Sequence[tuple[int, float]]  # batches that the device may run and the seconds they take, the largest first


def fastest_of(widths: Sequence[Width], profile: LatencyProfile) -> Width | None:
    """The width that runs one image the soonest; None when none of them is on offer."""
    if profile.fastest in widths and profile.ready(profile.fastest):
        return profile.fastest
    return min(filter(profile.ready, widths), key=lambda width: profile.p50(width, 1), default=None)


def sizes_for(kinds: Iterable[tuple[Width, ...]], load: Load, profile: LatencyProfile) -> Sizes:
    """What the device offers to a queue of images that allow these widths, in the median, from one batch to the next.

    Where some exclude the fastest width, all are counted at the slowest that one of them needs.
    """
    fastest = {width for widths in kinds if (width := fastest_of(widths, profile)) is not None}
    if not fastest:
        return ()
    rows = max((profile.rows(width) for width in fastest), key=lambda rows: rows[0].p50_s)
    return [(row.batch, load.interference * row.p50_s + load.hop_s) for row in reversed(rows)]


def in_time(due: Sequence[float], first: int, clock: float, sizes: Sizes) -> bool:
    """Whether all of ``due[first:]`` are met by a device that is free at ``clock`` and serves them in order, each time
    in the largest batch that meets the earliest instant."""
    while first < len(due):
        earliest = due[first]
        for batch, seconds in sizes:
            if clock + seconds <= earliest:
                break
        else:
            return False
        first += batch
        clock += seconds
    return True


def soonest_of(widths: Sequence[Width], load: Load, profile: LatencyProfile, now: float) -> float:
    """When an image that allows these widths could be answered, run alone now; infinite when none is on offer."""
    width = fastest_of(widths, profile)
    alone_s = float("inf") if width is None else load.interference * profile.rows(width)[0].p50_s
    return now + load.hop_s + alone_s + load.respond_s


def admissible(
    due: float,
    widths: tuple[Width, ...],
    queue: QueueView,
    load: Load,
    profile: LatencyProfile,
    *,
    now: float,
    free_at: float,
    decoded_at: float,
    preparing: int = 0,
) -> bool:
    """Whether an image can be answered by ``due`` without making anybody late who was let in before.

    The device is busy until ``free_at``; the image, and ``preparing`` others that came before it, will have been decoded
    by ``decoded_at``. Behind others there is room for one batch that takes its p99; alone there is none, or a cell whose
    samples were bad would never get better ones.
    """
    fastest = fastest_of(widths, profile)
    if fastest is None:
        return False
    clock = max(free_at, decoded_at, now) + load.hop_s + load.respond_s
    sizes = sizes_for({widths, *queue.kinds}, load, profile)
    if free_at > now or queue.due or preparing:
        row = profile.rows(fastest)[0]
        clock += load.interference * (row.p99_s - row.p50_s) + math.ceil(preparing / sizes[0][0]) * sizes[0][1]
    return fits(queue.due, due, clock, sizes)


def fits(due: Sequence[float], newcomer: float, clock: float, sizes: Sizes) -> bool:
    """Whether one more image can be answered by ``newcomer`` without making any of ``due`` late, served as ``in_time``
    does. Those that are late in any case are no obstacle."""
    soonest = clock + sizes[-1][1]
    queue = [*due[bisect_left(due, soonest) :]]
    insort(queue, newcomer)
    return newcomer >= soonest and in_time(queue, 0, clock, sizes)
