"""The adaptive policy: of all batches and widths that make nobody late, the one that is worth the most.

A missed deadline costs a request's whole accuracy, the next width only a point or two. So a decision has two parts.

1. What is *feasible* is checked exactly: an action may be taken if the batch meets the earliest deadline, and if all
   others that wait could then still meet theirs, were the device to serve them at its fastest width.
2. Which of those is *best* was worked out beforehand by a ``Plan``, from how many wait and how fast more arrive: it
   prices the queue that an action leaves behind and the arrivals that it keeps waiting.

Where no action is feasible, as many as possible are saved: the fastest width, the largest batch that is in time. An
image that even an immediate run at its fastest width would make late is shed; running it could only harm others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import compress

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.policies.deadlines import fastest_of, in_time, sizes_for, soonest_of
from server.policies.plan import Action, Plan
from server.types import Decision, Load, QueueView


class Adaptive:
    """Follows ``plan``, which may be replaced at any time; without one, the fastest width."""

    def __init__(self, plan: Plan | None = None) -> None:
        self.plan = plan

    def __call__(self, queue: QueueView, load: Load, profile: LatencyProfile, now: float) -> Decision:
        """``queue`` must not be empty."""
        start = now + load.hop_s + load.respond_s
        alive, shed = sort_out(queue, load, profile, now)
        if not alive:
            return Decision(profile.fastest, (), shed, 0.0, "late at every width")
        actions = self._actions(load, len(alive))
        sizes = sizes_for(queue.kinds, load, profile)
        mixed = len(queue.kinds) > 1
        allowed = queue.widths[alive[0]]
        for action in actions:
            width = profile.widths[action.width]
            if width not in allowed or action.batch > profile.max_batch(width):
                continue
            members = _joining(width, alive, queue, actions, profile) if mixed else alive
            batch = members[: action.batch]
            seconds = load.interference * profile.p99(width, len(batch))
            if start + seconds <= queue.due[batch[0]] and _others_in_time(queue, alive, batch, start + seconds, sizes):
                return Decision(width, batch, shed, seconds, "adaptive")
        fastest = fastest_of(allowed, profile)
        assert fastest is not None, "or the head would not be alive"
        members = _joining(fastest, alive, queue, actions, profile) if mixed else alive
        return hurried(fastest, members, queue, load, profile, start, shed)

    def _actions(self, load: Load, waiting: int) -> Sequence[Action]:
        return self.plan.actions(load.arrival_rate * load.interference, waiting) if self.plan is not None else ()


def sort_out(queue: QueueView, load: Load, profile: LatencyProfile, now: float) -> tuple[Sequence[int], Sequence[int]]:
    """Positions of those who may still be answered in time, and of those who cannot be, run alone now at their fastest
    width (or whose widths are not on offer)."""
    soonest = {widths: soonest_of(widths, load, profile, now) for widths in queue.kinds}
    if len(soonest) == 1:
        first = bisect_left(queue.due, next(iter(soonest.values())))
        return range(first, len(queue.due)), range(first)
    late = [due < soonest[widths] for due, widths in zip(queue.due, queue.widths, strict=True)]
    places = range(len(late))
    return [i for i in places if not late[i]], list(compress(places, late))


def hurried(
    width: Width,
    members: Sequence[int],
    queue: QueueView,
    load: Load,
    profile: LatencyProfile,
    start: float,
    shed: Sequence[int],
) -> Decision:
    """The largest batch at ``width`` that is in time for its first, or the first alone."""
    size = 1
    for row in profile.rows(width):
        if row.batch <= len(members) and start + load.interference * row.p99_s <= queue.due[members[0]]:
            size = row.batch
    return Decision(width, members[:size], shed, load.interference * profile.p99(width, size), "hurried")


def _others_in_time(
    queue: QueueView, alive: Sequence[int], batch: Sequence[int], clock: float, sizes: Sequence[tuple[int, float]]
) -> bool:
    """Whether those left behind can meet their deadlines once the device is free again, at ``clock``."""
    if isinstance(batch, range):  # without pins and floors: the first of the queue
        return in_time(queue.due, batch.stop, clock, sizes)
    chosen = set(batch)
    return in_time([queue.due[i] for i in alive if i not in chosen], 0, clock, sizes)


def _joining(
    width: Width, alive: Sequence[int], queue: QueueView, actions: Sequence[Action], profile: LatencyProfile
) -> list[int]:
    """Who may run at ``width`` beside the head: who allows it, and would not by himself be given a better one."""
    joins = {queue.widths[alive[0]]: True}
    for widths in queue.kinds:
        own = next((profile.widths[a.width] for a in actions if profile.widths[a.width] in widths), width)
        joins.setdefault(widths, width in widths and profile.accuracy[width] >= profile.accuracy[own])
    return [i for i in alive if joins[queue.widths[i]]]
