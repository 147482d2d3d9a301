"""The adaptive policy: of all batches and widths that make nobody late, the one that is worth the most.

A missed deadline costs a request's whole accuracy, the next width only a point or two. So a decision has two parts.

1. What is *feasible* is checked exactly: an action may be taken if the batch meets the earliest deadline, and if all
   others that wait could then still meet theirs, were the device to serve them at its fastest width.
2. Which of those is *best* was worked out beforehand by a ``Plan``, from how many wait and how fast more arrive: it
   prices the queue that an action leaves behind and the arrivals that it keeps waiting.

An action may also give up the most urgent images, at the price of their answers: where batches are nearly free, to run
one image alone could cost many others their time. An image that even an immediate run at its fastest width would make
late is shed; running it could only harm others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import compress

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.policies.deadlines import fastest_of, in_time, margin_s, sizes_for, soonest_of
from server.policies.plan import Action, Plan
from server.types import Decision, Load, QueueView

PROMISED = 3  # to give up an image that was let in is as bad as not to save so many


class Adaptive:
    """Follows ``plan``, which may be replaced at any time; without one, the fastest width."""

    def __init__(self, plan: Plan | None = None) -> None:
        self.plan = plan

    def __call__(self, queue: QueueView, load: Load, profile: LatencyProfile, now: float) -> Decision:
        """``queue`` must not be empty."""
        alive, shed = sort_out(queue, load, profile, now)
        if not alive:
            return Decision(profile.fastest, (), shed, 0.0, "late at every width")
        actions: Sequence[Action] = ()
        if self.plan is not None:
            actions = self.plan.ranked(load.arrival_rate, load.interference, len(alive))
        options = _Options(queue, load, profile, now, alive, shed, actions)
        best = options.best()
        if best is None:
            return options.hurried()
        return best if best.width != options.fastest else options.larger(best)


class _Options:
    """What can be done in one situation. ``alive`` are positions in the queue, ``shed`` those that are late anyway."""

    def __init__(
        self,
        queue: QueueView,
        load: Load,
        profile: LatencyProfile,
        now: float,
        alive: Sequence[int],
        shed: Sequence[int],
        actions: Sequence[Action],
    ) -> None:
        self._queue, self._load, self._profile = queue, load, profile
        self._alive, self._shed, self._actions = alive, shed, actions
        self._start = now + load.hop_s + load.respond_s
        self._allowed = queue.widths[alive[0]]  # the head decides; others join where that costs them no accuracy
        self._sizes = sizes_for(queue.kinds, load, profile)
        fastest = fastest_of(self._allowed, profile)
        assert fastest is not None, "or the head would not be alive"
        self.fastest = fastest
        self._margin_s = margin_s(len(alive), fastest, load, profile)

    def best(self) -> Decision | None:
        """The feasible action of most worth, less the answers that it gives up."""
        best, best_worth = None, -float("inf")
        for action in self._actions:
            if action.worth <= best_worth:
                break
            width = self._profile.widths[action.width]
            if width in self._allowed and action.batch <= self._profile.max_batch(width):
                given_up, decision = self._attempt(width, action.batch, "adaptive")
                worth = action.worth - given_up * self._profile.accuracy[self.fastest]
                if worth > best_worth and self._others_in_time(decision, given_up):
                    best, best_worth = decision, worth
        return best

    def larger(self, best: Decision) -> Decision:
        """The largest feasible batch at the fastest width: when it is best, time is what is short."""
        for row in reversed(self._profile.rows(self.fastest)):
            if row.batch <= len(best.batch):
                break
            given_up, decision = self._attempt(self.fastest, row.batch, best.reason)
            if not given_up and self._others_in_time(decision, 0):
                return decision
        return best

    def hurried(self) -> Decision:
        """Somebody will be late. The batch at the fastest width that saves the most images a second."""
        attempts = [self._attempt(self.fastest, row.batch, "hurried") for row in self._profile.rows(self.fastest)]
        saved = [(len(each.batch) - PROMISED * given_up) / each.predicted_s for given_up, each in attempts]
        best = max(range(len(attempts)), key=saved.__getitem__)
        return (
            attempts[best][1]
            if saved[best] > 0
            else self._run(self._joining(self.fastest)[:1], self.fastest, "hurried")
        )

    def _attempt(self, width: Width, size: int, reason: str) -> tuple[int, Decision]:
        """A batch of up to ``size``, and how many more urgent ones it gives up."""
        members = self._joining(width)
        finish = self._start + self._load.interference * self._profile.p99(width, min(size, len(members)))
        first = 0
        while first < len(members) and self._queue.due[members[first]] < finish:
            first += 1
        return first, self._run(members[first : first + size], width, reason)

    def _run(self, batch: Sequence[int], width: Width, reason: str) -> Decision:
        seconds = self._load.interference * self._profile.p99(width, max(1, len(batch)))
        return Decision(width, batch, self._shed, seconds, reason)

    def _others_in_time(self, decision: Decision, given_up: int) -> bool:
        """Whether those left behind can meet their deadlines once the device is free again."""
        batch, due = decision.batch, self._queue.due
        if not batch:
            return False
        clock = self._start + decision.predicted_s + (0.0 if decision.width == self.fastest else self._margin_s)
        if isinstance(batch, range):  # without pins and floors: all that follow
            return in_time(due, batch.stop, clock, self._sizes)
        gone = {*batch, *self._joining(decision.width)[:given_up]}
        return in_time([due[i] for i in self._alive if i not in gone], 0, clock, self._sizes)

    def _joining(self, width: Width) -> Sequence[int]:
        """Who may run at ``width``: who allows it, and would not by himself be given a better one."""
        queue, profile = self._queue, self._profile
        if len(queue.kinds) == 1:
            return self._alive
        joins = {self._allowed: True}
        for widths in queue.kinds:
            own = next((profile.widths[a.width] for a in self._actions if profile.widths[a.width] in widths), width)
            joins.setdefault(widths, width in widths and profile.accuracy[width] >= profile.accuracy[own])
        return [i for i in self._alive if joins[queue.widths[i]]]


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
