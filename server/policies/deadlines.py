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
    """The width that gets through the most images; None when none of them is on offer."""
    for width in profile.by_speed:
        if width in widths:
            return width
    return None


def sizes_for(kinds: Iterable[tuple[Width, ...]], load: Load, profile: LatencyProfile) -> Sizes:
    """What the device offers to a queue of images that allow these widths, in the median, from one batch to the next.

    Where some exclude the fastest width, all are counted at the slowest that one of them needs.
    """
    needed = {fastest_of(widths, profile) for widths in kinds}
    slowest = next((width for width in reversed(profile.by_speed) if width in needed), None)
    if slowest is None:
        return ()
    return [(row.batch, load.interference * row.p50_s + load.hop_s) for row in reversed(profile.rows(slowest))]


def in_time(due: Sequence[float], first: int, clock: float, sizes: Sizes) -> bool:
    """Whether all of ``due[first:]`` are met by a device that is free at ``clock`` and serves them in order, each time
    in the largest batch that meets the earliest instant."""
    while first < len(due):
        patience_s = due[first] - clock
        for batch, seconds in sizes:  # noqa: B007
            if seconds <= patience_s:
                break
        else:
            return False
        first += batch
        clock += seconds
    return True


def work_s(images: int, sizes: Sizes) -> float:
    """Seconds for so many images: in the largest batches, and the rest in the smallest one that holds it."""
    full, rest = divmod(images, sizes[0][0])
    return full * sizes[0][1] + (min(seconds for batch, seconds in sizes if batch >= rest) if rest else 0.0)


def margin_s(waiting: int, fastest: Width, load: Load, profile: LatencyProfile) -> float:
    """How much longer than in the median it may take to run so many images: as the p99 of a batch, if batches vary
    independently."""
    rows = profile.rows(fastest)
    row = next((row for row in rows if row.batch >= waiting), rows[-1])
    return load.interference * (row.p99_s - row.p50_s) * math.sqrt(max(1.0, waiting / row.batch))


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

    The device is busy until ``free_at`` at the latest; the image, and ``preparing`` others that came before it, will
    have been decoded by ``decoded_at``. Behind others there is room for a batch that takes its p99; alone there is
    none, or a cell whose samples were bad would never get better ones.
    """
    fastest = fastest_of(widths, profile)
    if fastest is None:
        return False
    clock = max(free_at, decoded_at, now) + load.respond_s
    sizes = sizes_for({widths, *queue.kinds}, load, profile)
    if queue.due or preparing:
        clock += margin_s(len(queue.due) + preparing + 1, fastest, load, profile)
        clock += work_s(preparing, sizes)
    return fits(queue.due, due, clock, sizes)


def fits(due: Sequence[float], newcomer: float, clock: float, sizes: Sizes) -> bool:
    """Whether one more image can be answered by ``newcomer`` without making any of ``due`` late, served as ``in_time``
    does. Those that are late in any case are no obstacle."""
    soonest = clock + sizes[-1][1]
    queue = [*due[bisect_left(due, soonest) :]]
    insort(queue, newcomer)
    return newcomer >= soonest and in_time(queue, 0, clock, sizes)
