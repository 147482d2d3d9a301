"""The adaptive policy: the most accurate width that the queue AND the arrivals to come can afford.

A missed deadline costs a request's whole accuracy, the next width only a point or two. So a width is affordable when

1. served at that width, every waiting image meets its deadline, in the order of the queue, and
2. the images that keep arriving, served at that width, leave the device some idle time. (An image that waits alone is
   spared this rule: one caller who asks again as soon as he is answered is no overload.)

A width that is dominated at the batch that could run now is not even considered: on a GPU one image takes as long at
every width, so a narrow one is worth its loss of accuracy only where many wait.

Without the second rule a policy fills its slack with width, keeps the queue long and loses to the best fixed width.
Where no width affords everything, the narrowest is taken; an image that even an immediate run at its narrowest width
would make late is shed, since running it could only harm those behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.types import Decision, Load, Waiting

# Share of the device that expected arrivals may take. At 1 a queue never drains (M/D/1: waiting grows as 1/(1-u)).
MAX_UTILIZATION = 0.8


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a decision is made from. ``alive`` and ``shed`` are positions in ``queue``; ``goals`` one instant each."""

    queue: Sequence[Waiting]
    load: Load
    profile: LatencyProfile
    now: float
    alive: tuple[int, ...]
    shed: frozenset[int]
    goals: tuple[float, ...]

    def seconds(self, width: Width, batch: int) -> float:
        """From a decision to the engine's result, as the present load has it, at p99."""
        return self.load.hop_s + self.load.interference * self.profile.p99(width, batch)

    def num_joining(self, widths: Sequence[Width]) -> int:
        """How many of the living allow one of ``widths``: no batch at one of them can be larger."""
        return sum(any(w in widths for w in self.queue[i].widths) for i in self.alive)


def adaptive(queue: Sequence[Waiting], load: Load, profile: LatencyProfile, now: float) -> Decision:
    """Choose width and batch; see the module's text. ``queue`` must not be empty."""
    view = outlook(queue, load, profile, now)
    if not view.alive:
        return Decision(profile.fastest, (), view.shed, 0.0, "late at every width")
    choice = {widths: _choose(widths, view) for widths in {queue[i].widths for i in view.alive}}
    width = choice[queue[view.alive[0]].widths]
    # The head decides; those behind it join where that costs them no accuracy.
    willing = [
        i
        for i in view.alive
        if width in queue[i].widths and profile.accuracy[width] >= profile.accuracy[choice[queue[i].widths]]
    ]
    return batch_at(width, willing, view, "adaptive")


def outlook(queue: Sequence[Waiting], load: Load, profile: LatencyProfile, now: float) -> Outlook:
    """Sort out who can still be served, and by when each should be.

    Hopeless is an image that would be late even if it ran alone, now, at the fastest width it allows, or that allows
    none on offer. The goal of the others is ``order_by`` while that can be reached, else ``deadline``.
    """
    if not profile.ready(profile.fastest):  # then no width is, all of them withdrawn
        return Outlook(queue, load, profile, now, (), frozenset(range(len(queue))), ())
    alone_s = {
        widths: min((profile.p50(w, 1) for w in widths if profile.ready(w)), default=float("inf"))
        for widths in {item.widths for item in queue}
    }
    start = now + load.hop_s + load.respond_s
    soonest = start + load.interference * profile.p99(profile.fastest, 1)
    shed = frozenset(
        i for i, item in enumerate(queue) if start + load.interference * alone_s[item.widths] > item.deadline
    )
    return Outlook(
        queue,
        load,
        profile,
        now,
        alive=tuple(i for i in range(len(queue)) if i not in shed),
        shed=shed,
        goals=tuple(item.order_by if item.order_by > soonest else item.deadline for item in queue),
    )


def usable(widths: Sequence[Width], profile: LatencyProfile, batch: int) -> list[Width]:
    """The warmed widths among ``widths`` without those that are dominated (unless that leaves none).

    Each is judged at ``batch`` images, or at the largest batch that it offers.
    """
    ready = [w for w in widths if profile.ready(w)]
    worthwhile = [w for w in ready if w not in profile.dominated_at(min(batch, profile.max_batch(w)))]
    return worthwhile or ready


def sustainable(width: Width, load: Load, profile: LatencyProfile) -> bool:
    """Whether arrivals at the present rate, all at this width, leave the device idle for a fifth of the time."""
    per_image_s = load.interference * profile.seconds_per_image(width) + load.hop_s / profile.best_batch(width)
    return load.arrival_rate * per_image_s <= MAX_UTILIZATION


def all_in_time(width: Width, view: Outlook) -> bool:
    """Whether every image meets its goal when served in order at ``width``, in the largest batches that do.

    An image that does not allow ``width`` is counted at the fastest width that it does allow.
    """
    others = {view.queue[i].widths for i in view.alive} - {view.profile.widths}
    slower = [_fastest(widths, view) for widths in others if width not in widths]
    slowest = max([width, *slower], key=lambda w: _seconds_per_image(w, view.profile, len(view.alive)))
    due = [view.goals[i] for i in view.alive]
    clock, start = view.now + view.load.respond_s, 0
    sizes = [(batch, view.seconds(slowest, batch)) for batch in view.profile.warmed(slowest)]
    while start < len(due):
        fitting = [(batch, s) for batch, s in sizes if clock + s <= min(due[start : start + batch])]
        if not fitting:
            return False
        batch, seconds = fitting[-1]
        clock, start = clock + seconds, start + batch
    return True


def batch_at(width: Width, willing: Sequence[int], view: Outlook, reason: str) -> Decision:
    """The longest batch from the first of ``willing`` on that makes nobody in it late."""
    batch: list[int] = []
    earliest = float("inf")
    for i in willing[: view.profile.max_batch(width)]:
        earliest = min(earliest, view.goals[i])
        if batch and view.now + view.load.respond_s + view.seconds(width, len(batch) + 1) > earliest:
            break
        batch.append(i)
    predicted_s = view.load.interference * view.profile.p99(width, len(batch))
    return Decision(width, tuple(batch), view.shed, predicted_s, reason)


def _choose(widths: Sequence[Width], view: Outlook) -> Width:
    candidates = usable(widths, view.profile, view.num_joining(widths))
    for width in sorted(candidates, key=lambda w: view.profile.accuracy[w], reverse=True):
        if (len(view.alive) == 1 or sustainable(width, view.load, view.profile)) and all_in_time(width, view):
            return width
    return _fastest(widths, view)


def _fastest(widths: Sequence[Width], view: Outlook) -> Width:
    """Of those on offer the one that gets through all who may join the soonest."""
    batch = view.num_joining(widths)
    return min(usable(widths, view.profile, batch), key=lambda w: _seconds_per_image(w, view.profile, batch))


def _seconds_per_image(width: Width, profile: LatencyProfile, batch: int) -> float:
    """In a batch of ``batch`` images, or in the largest on offer."""
    largest = min(batch, profile.max_batch(width))
    return profile.p50(width, largest) / largest
