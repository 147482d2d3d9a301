"""The adaptive policy: the most accurate width that the queue AND the arrivals to come can afford.

A missed deadline costs a request's whole accuracy, the next width only a point or two. So a width is affordable when

1. served at that width, every waiting image meets its deadline, in the order of the queue, and
2. the images that keep arriving, served at that width, leave the device some idle time.

Without the second rule a policy fills its slack with width, keeps the queue long and loses to the best fixed width.
Where no width affords everything, the narrowest is taken; an image that even an immediate run at its narrowest width
would make late is shed, since running it could only harm those behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.types import Decision, Load, Waiting

# Share of the device that expected arrivals may take. At 1 a queue never drains (M/D/1: waiting grows as 1/(1-u)).
MAX_UTILIZATION = 0.8


def adaptive(queue: Sequence[Waiting], load: Load, profile: LatencyProfile, now: float) -> Decision:
    """Choose width and batch; see the module's text. ``queue`` must not be empty."""
    shed = hopeless(queue, load, profile, now)
    alive = [i for i in range(len(queue)) if i not in shed]
    if not alive:
        return Decision(profile.widths[0], (), shed, 0.0, "late at every width")
    goals = goals_of(queue, load, profile, now)
    candidates = sorted(usable(queue[alive[0]].widths, profile), key=lambda w: profile.accuracy[w])
    for width in reversed(candidates):
        if sustainable(width, load, profile) and all_in_time(width, queue, alive, goals, load, profile, now):
            return batch_at(width, queue, alive, goals, shed, load, profile, now, "most accurate that all can afford")
    narrowest = min(candidates, key=lambda w: profile.p50(w, 1))
    return batch_at(narrowest, queue, alive, goals, shed, load, profile, now, "no width affords all that waits")


def usable(widths: Sequence[Width], profile: LatencyProfile) -> list[Width]:
    """The warmed widths among ``widths`` without those that are dominated (unless that leaves none)."""
    ready = [w for w in widths if profile.ready(w)]
    worthwhile = [w for w in ready if w not in profile.dominated]
    return worthwhile or ready


def hopeless(queue: Sequence[Waiting], load: Load, profile: LatencyProfile, now: float) -> frozenset[int]:
    """Positions of images that would be late even if they ran alone, now, at the fastest width they allow."""
    fastest = {item.widths: profile.p50(_fastest(item.widths, profile), 1) for item in queue}
    start = now + load.respond_s
    return frozenset(
        i for i, item in enumerate(queue) if start + load.interference * fastest[item.widths] > item.deadline
    )


def goals_of(queue: Sequence[Waiting], load: Load, profile: LatencyProfile, now: float) -> list[float]:
    """When each image should be done: by ``order_by`` while that can be reached, else by ``deadline``."""
    soonest = now + load.interference * profile.p99(profile.fastest, 1)
    return [item.order_by if item.order_by > soonest else item.deadline for item in queue]


def sustainable(width: Width, load: Load, profile: LatencyProfile) -> bool:
    """Whether arrivals at the present rate, all at this width, leave the device idle for a fifth of the time."""
    per_image_s = load.interference * profile.seconds_per_image(width) + load.hop_s / profile.best_batch(width)
    return load.arrival_rate * per_image_s <= MAX_UTILIZATION


def all_in_time(
    width: Width,
    queue: Sequence[Waiting],
    alive: Sequence[int],
    goals: Sequence[float],
    load: Load,
    profile: LatencyProfile,
    now: float,
) -> bool:
    """Whether every image meets its goal when served in order at ``width``, in the largest batches that do.

    An image that does not allow ``width`` is counted at the fastest width that it does allow.
    """
    other = {queue[i].widths: _fastest(queue[i].widths, profile) for i in alive if width not in queue[i].widths}
    slowest = max([width, *other.values()], key=lambda w: profile.p50(w, 1))
    due = [goals[i] for i in alive]
    clock, start = now + load.respond_s, 0
    sizes = [(b, load.hop_s + load.interference * profile.p99(slowest, b)) for b in profile.warmed(slowest)]
    while start < len(due):
        fitting = [(b, s) for b, s in sizes if clock + s <= min(due[start : start + b])]
        if not fitting:
            return False
        batch, seconds = fitting[-1]
        clock, start = clock + seconds, start + batch
    return True


def batch_at(
    width: Width,
    queue: Sequence[Waiting],
    alive: Sequence[int],
    goals: Sequence[float],
    shed: frozenset[int],
    load: Load,
    profile: LatencyProfile,
    now: float,
    reason: str,
) -> Decision:
    """The longest batch from the head of the queue that allows ``width`` and makes nobody in it late."""
    batch: list[int] = []
    earliest, start, largest = float("inf"), now + load.respond_s, profile.max_batch(width)
    for i in alive:
        if width not in queue[i].widths:
            continue
        earliest = min(earliest, goals[i])
        late = start + load.interference * profile.p99(width, len(batch) + 1) > earliest
        if batch and (late or len(batch) == largest):
            break
        batch.append(i)
    return Decision(width, tuple(batch), shed, load.interference * profile.p99(width, len(batch)), reason)


def _fastest(widths: Sequence[Width], profile: LatencyProfile) -> Width:
    return min(usable(widths, profile), key=lambda w: profile.p50(w, 1))
