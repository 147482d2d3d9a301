"""Deadline arithmetic on a queue ordered by deadline: what one device can still finish in time. Instants in seconds."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.types import Load, QueueView

Sizes = Sequence[tuple[int, float]]  # batches that the device may run and the seconds they take, the largest first


def fastest_of(widths: Sequence[Width], profile: LatencyProfile) -> Width | None:
    """The width that gets through the most images; None when none of them is on offer."""
    return _first_of(profile.by_speed, widths)


def quickest_of(widths: Sequence[Width], profile: LatencyProfile) -> Width | None:
    """The width that takes least for one image, which on a GPU may be another; None when none of them is on offer."""
    return _first_of(profile.by_latency, widths)


def _first_of(order: Iterable[Width], widths: Sequence[Width]) -> Width | None:
    for width in order:
        if width in widths:
            return width
    return None


def sizes_for(widths: Sequence[Width], load: Load, profile: LatencyProfile) -> Sizes:
    """What the device offers to images that allow these widths, in the median, from one batch to the next: one image
    at the quickest of them, more at the fastest. Empty when none is on offer."""
    return _sizes(fastest_of(widths, profile), quickest_of(widths, profile), load, profile)


def _sizes(fastest: Width | None, quickest: Width | None, load: Load, profile: LatencyProfile) -> Sizes:
    if fastest is None or quickest is None:
        return ()
    rows = profile.rows(fastest)
    if quickest is not fastest:
        rows = (profile.rows(quickest)[0], *rows[1:])
    return [(row.batch, load.interference * row.p50_s + load.hop_s) for row in reversed(rows)]


def lanes_of(widths: Sequence[tuple[Width, ...]], load: Load, profile: LatencyProfile) -> tuple[bytes, Sequence[Sizes]]:
    """The lane of each image of a queue of several kinds, and what the device offers to each lane. In one are those
    that may always run together: they have the fastest and the quickest of their ``widths`` in common.

    The tuples are told apart as objects, since to hash one takes 1 µs; equal ones may be several objects. Lanes are
    bytes, which are quick to count and to cut.
    """
    ids = [*map(id, widths)]
    lanes, lane_of = dict[tuple[Width | None, Width | None], int](), dict[int, int]()
    for key, allowed in dict(zip(ids, widths, strict=True)).items():
        lane_of[key] = lanes.setdefault((fastest_of(allowed, profile), quickest_of(allowed, profile)), len(lanes))
    return bytes(map(lane_of.__getitem__, ids)), [_sizes(*pair, load, profile) for pair in lanes]


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


def lanes_in_time(due: Sequence[float], lanes: bytes, clock: float, sizes: Sequence[Sizes]) -> bool:
    """``in_time`` for several kinds: a batch is of the lane of the most urgent image, no larger than for those that are
    left of it, and whom it takes along is passed over later. So nobody delays those before him, however slow his width.
    """
    left = [lanes.count(lane) for lane in range(len(sizes))]
    ahead = [0] * len(sizes)  # of each lane, those that were taken along
    for instant, lane in zip(due, lanes, strict=True):
        if ahead[lane]:
            ahead[lane] -= 1
            continue
        batch, patience_s = 0, instant - clock
        for size, seconds in sizes[lane]:
            if batch and size < left[lane]:
                break
            if seconds <= patience_s:
                batch, batch_s = size, seconds
        if not batch:
            return False
        ahead[lane] = batch - 1
        left[lane] -= batch
        clock += batch_s
    return True


def work_s(images: int, sizes: Sizes) -> float:
    """Seconds for so many images: in the largest batches, and the rest in the smallest one that holds it."""
    full, rest = divmod(images, sizes[0][0])
    return full * sizes[0][1] + (min(seconds for batch, seconds in sizes if batch >= rest) if rest else 0.0)


def mixed_work_s(images: int, kinds: Mapping[tuple[Width, ...], int], load: Load, profile: LatencyProfile) -> float:
    """Seconds for so many images, of these ``kinds`` in this proportion, each at the fastest of its widths."""
    offers = [(count, sizes) for widths, count in kinds.items() if (sizes := sizes_for(widths, load, profile))]
    return sum(count * work_s(images, sizes) for count, sizes in offers) / max(1, sum(count for count, _ in offers))


def margin_s(waiting: int, fastest: Width, load: Load, profile: LatencyProfile) -> float:
    """How much longer than in the median it may take to run so many images: as the p99 of a batch, if batches vary
    independently."""
    rows = profile.rows(fastest)
    row = next((row for row in rows if row.batch >= waiting), rows[-1])
    return load.interference * (row.p99_s - row.p50_s) * math.sqrt(max(1.0, waiting / row.batch))


def mixed_margin_s(kinds: Mapping[tuple[Width, ...], int], load: Load, profile: LatencyProfile) -> float:
    """``margin_s`` for so many images of each of these ``kinds``: of independent times the variances add up."""
    offers = [(count, fastest) for widths, count in kinds.items() if (fastest := fastest_of(widths, profile))]
    return math.hypot(*(margin_s(count, fastest, load, profile) for count, fastest in offers))


def soonest_of(widths: Sequence[Width], load: Load, profile: LatencyProfile, now: float) -> float:
    """When an image that allows these widths could be answered, run alone now; infinite when none is on offer."""
    width = quickest_of(widths, profile)
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
    have been decoded by ``decoded_at``. Those are taken to be such as it and those that wait. Behind others there is
    room for a batch that takes its p99; alone there is none, or a cell whose samples were bad would never get better
    ones.
    """
    clock, spare_s = max(free_at, decoded_at, now) + load.respond_s, 0.0
    if queue.due or preparing:
        kinds = Counter(queue.kinds)
        kinds[widths] += 1
        clock += mixed_work_s(preparing, kinds, load, profile)
        kinds[widths] += preparing
        spare_s = mixed_margin_s(kinds, load, profile)
    return fits(queue, due, widths, clock, load, profile, spare_s=spare_s)


def fits(
    queue: QueueView,
    newcomer: float,
    widths: tuple[Width, ...],
    clock: float,
    load: Load,
    profile: LatencyProfile,
    *,
    spare_s: float = 0.0,
) -> bool:
    """Whether one more image, that allows ``widths``, can be answered by ``newcomer`` without making anybody late,
    served as ``in_time`` does, by a device that is free ``spare_s`` after ``clock``.

    Those that are late then in any case are no obstacle. In a mixed queue, where one may take as long as many others,
    those that would not be late at ``clock`` are counted with the time that they take.
    """
    start, sizes = clock + spare_s, sizes_for(widths, load, profile)
    if not sizes or newcomer < (soonest := start + sizes[-1][1]):
        return False
    if queue.kinds.keys() <= {widths}:
        due = [*queue.due[bisect_left(queue.due, soonest) :]]
        insort(due, newcomer)
        return in_time(due, 0, start, sizes)
    instants, lanes, offers = [*queue.due, newcomer], *lanes_of([*queue.widths, widths], load, profile)
    line = sorted(zip(instants, lanes, strict=True))
    alone_s = [sizes[-1][1] if sizes else float("inf") for sizes in offers]
    tight = bytes(lane for due, lane in line if clock <= due - alone_s[lane] < start)
    line = [(due, lane) for due, lane in line if due - alone_s[lane] >= start]
    start += sum(work_s(tight.count(lane), sizes) for lane, sizes in enumerate(offers) if sizes)
    return lanes_in_time([due for due, _ in line], bytes(lane for _, lane in line), start, offers)
