"""The adaptive policy: of all batches and widths that make nobody late, the one that is worth the most.

A missed deadline costs a request's whole accuracy, the next width only a point or two. So a decision has two parts.

1. What is *feasible* is checked exactly: an action may be taken if the batch meets the earliest deadline, and if all
   others that wait could then still meet theirs, were the device to serve each at the fastest width that he allows.
2. Which of those is *best* was worked out beforehand by a ``Plan``, from how many wait and how fast more arrive: it
   prices the queue that an action leaves behind and the arrivals that it keeps waiting.

An action may also give up the most urgent images, at the price of their answers: where batches are nearly free, to run
one image alone could cost many others their time. An image that even an immediate run at its fastest width would make
late is shed; running it could only harm others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import compress, count
from operator import not_
from typing import NamedTuple

from scala_model.width import Width
from server.latency_profile import LatencyProfile, Row
from server.policies.deadlines import (
    Sizes,
    fastest_of,
    in_time,
    lanes_in_time,
    lanes_of,
    margin_s,
    sizes_for,
    soonest_of,
)
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
        return _Options(queue, load, profile, now, alive, shed, actions).decide()


class _Crowd(NamedTuple):
    """Who may run together: places among the living, and their deadlines; and those who may not, with their lanes."""

    places: Sequence[int]
    due: Sequence[float]
    others_due: Sequence[float]
    others_lanes: bytes


# Width, crowd, first, stop, seconds: run those of the crowd from first to stop; the more urgent ones are given up, for
# they would be late. Not a named tuple, which takes longer to make than everything that is looked up for it.
_Attempt = tuple[int, _Crowd, int, int, float]


class _Options:
    """What can be done in one situation. ``alive`` are positions in the queue, ``shed`` those that are late anyway.

    Widths are their indices in the profile: to hash or to compare some hundred ``Width`` would take most of the time.
    """

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
        self._load, self._profile = load, profile
        self._alive, self._shed, self._actions = alive, shed, actions
        self._due = [queue.due[i] for i in alive] if shed else queue.due
        self._start = now + load.hop_s + load.respond_s
        allowed = queue.widths[alive[0]]  # the head decides; others join where that costs them no accuracy
        fastest = fastest_of(allowed, profile)
        assert fastest is not None, "or the head would not be alive"
        self._fastest = profile.widths.index(fastest)
        self._margin_s = margin_s(len(alive), fastest, load, profile)
        self._crowds: Sequence[_Crowd] | Mapping[int, _Crowd]  # of each width
        self._sizes: Sequence[Sizes]  # what the device offers to each lane
        self._promised = 0 if len(queue.kinds) == 1 else PROMISED  # for plans know nothing of kinds
        if len(queue.kinds) == 1:
            self._lanes, self._sizes = b"", [sizes_for(allowed, load, profile)]
            self._crowds = [_Crowd(range(len(alive)), self._due, (), b"")] * len(profile.widths)
        else:
            widths = [queue.widths[i] for i in alive] if shed else queue.widths
            self._lanes, self._sizes = lanes_of(widths, load, profile)
            self._crowds = _Crowds(widths, self._due, self._lanes, actions, profile)
        usual = allowed == profile.widths  # 0.1 µs
        self._rows = [profile.rows(width) if usual or width in allowed else () for width in profile.widths]

    def decide(self) -> Decision:
        best = self._best()
        if best is None:
            return self._decision(self._hurried(), "hurried")
        width, *_ = best
        return self._decision(best if width != self._fastest else self._larger(best), "adaptive")

    def _best(self) -> _Attempt | None:
        """The feasible action of most worth, less the answers that it gives up."""
        best, best_worth = None, -float("inf")
        place = {size: i for i, size in enumerate(self._profile.buckets)}
        price = self._profile.accuracy[self._profile.widths[self._fastest]]
        for width, size, worth in self._actions:
            if worth <= best_worth:
                break
            rows = self._rows[width]
            if place[size] < len(rows):
                attempt = self._attempt(width, rows[place[size]])
                _, _, given_up, stop, _ = attempt
                if given_up:
                    if width != self._fastest or stop - given_up < self._promised * given_up:
                        continue  # nobody is given up for others' accuracy
                    worth -= given_up * price
                if worth > best_worth and self._others_in_time(attempt):
                    best, best_worth = attempt, worth
        return best

    def _larger(self, best: _Attempt) -> _Attempt:
        """The largest feasible batch at the fastest width: when it is best, time is what is short."""
        _, _, first, stop, _ = best
        for row in reversed(self._rows[self._fastest]):
            if row.batch <= stop - first:
                break
            attempt = self._attempt(self._fastest, row)
            _, _, given_up, _, _ = attempt
            if not given_up and self._others_in_time(attempt):
                return attempt
        return best

    def _hurried(self) -> _Attempt:
        """Somebody will be late. The batch at the fastest width that saves the most images a second; where none saves
        more than it gives up, the head alone, at the width that takes least for one."""
        attempts = [self._attempt(self._fastest, row) for row in self._rows[self._fastest]]
        saved = [(stop - first - PROMISED * first) / seconds for _, _, first, stop, seconds in attempts]
        best = max(range(len(attempts)), key=saved.__getitem__)
        if saved[best] > 0:
            return attempts[best]
        quickest = min((i for i, rows in enumerate(self._rows) if rows), key=lambda i: self._rows[i][0].p50_s)
        return quickest, self._crowds[quickest], 0, 1, self._seconds(quickest, 1)

    def _at_no_loss(self, attempt: _Attempt) -> _Attempt:
        """The same images at the most accurate width that takes no longer for them, in the median and at p99,
        when this one is dominated."""
        width, crowd, first, stop, _ = attempt
        profile, widths, batch = self._profile, self._profile.widths, stop - first
        dominated = profile.dominated_at(batch)
        if not dominated or widths[width] not in dominated:
            return attempt
        p50_s, p99_s = profile.p50(widths[width], batch), profile.p99(widths[width], batch)
        images = {*crowd.places[first:stop]}
        no_slower = [
            other
            for other, rows in enumerate(self._rows)
            if rows
            and batch <= rows[-1].batch
            and profile.p50(widths[other], batch) <= p50_s
            and profile.p99(widths[other], batch) <= p99_s
            and images.issubset(self._crowds[other].places)
        ]
        best = max(no_slower, key=lambda i: (profile.accuracy[widths[i]], -profile.p50(widths[i], batch)))
        return best, crowd, first, stop, self._seconds(best, batch)

    def _attempt(self, width: int, row: Row) -> _Attempt:
        """A batch of up to this size, without those whom it would make late."""
        crowd, size = self._crowds[width], row.batch
        count = len(crowd.due)
        seconds = self._load.p99(row.p99_s) if size <= count else self._seconds(width, count)
        given_up = bisect_left(crowd.due, self._start + seconds)
        stop = given_up + size
        if stop > count:
            stop = count
            seconds = self._seconds(width, max(1, stop - given_up))
        return width, crowd, given_up, stop, seconds

    def _seconds(self, width: int, batch: int) -> float:
        return self._load.p99(self._profile.p99(self._profile.widths[width], batch))

    def _others_in_time(self, attempt: _Attempt) -> bool:
        """Whether those left behind can meet their deadlines once the device is free again."""
        width, crowd, given_up, stop, seconds = attempt
        if stop == given_up:
            return False
        clock = self._start + seconds
        if width != self._fastest:
            clock += self._margin_s
        end = crowd.places[stop - 1] + 1  # of those before it, only the others stay
        if end == stop and len(self._sizes) == 1:
            return in_time(self._due, end, clock, self._sizes[0])
        due = [*crowd.others_due[: end - stop], *self._due[end:]]
        lanes = crowd.others_lanes[: end - stop] + self._lanes[end:]
        return lanes_in_time(due, lanes, clock, self._sizes)

    def _decision(self, attempt: _Attempt, reason: str) -> Decision:
        width, crowd, given_up, stop, seconds = self._at_no_loss(attempt)
        batch = crowd.places[given_up:stop]
        batch = self._alive[batch.start : batch.stop] if isinstance(batch, range) else [self._alive[i] for i in batch]
        return Decision(self._profile.widths[width], batch, self._shed, seconds, reason)


class _Crowds(dict[int, _Crowd]):
    """Living images that allow different ``widths``, the head's first.

    The tuples are told apart as objects, since to hash one takes 1 µs; equal ones may be several objects.
    """

    def __init__(
        self,
        widths: Sequence[tuple[Width, ...]],
        due: Sequence[float],
        lanes: bytes,
        actions: Sequence[Action],
        profile: LatencyProfile,
    ) -> None:
        super().__init__()
        self._due, self._lanes, self._accuracy = due, lanes, [*profile.accuracy.values()]
        self._ids = [*map(id, widths)]
        index = {width: i for i, width in enumerate(profile.widths)}
        different = dict(zip(self._ids, widths, strict=True))
        self._kinds = {key: [index[width] for width in allowed] for key, allowed in different.items()}
        self._head = self._kinds[self._ids[0]]
        ranked = [*dict.fromkeys(action.width for action in actions)]
        own = [next((width for width in ranked if width in allowed), None) for allowed in self._kinds.values()]
        self._own = [0.0 if width is None else self._accuracy[width] for width in own]
        self._those_of: dict[tuple[bool, ...], _Crowd] = {}

    def __missing__(self, width: int) -> _Crowd:
        """Who may run at ``width`` with the head: who allows it, and would not by himself be given a better one."""
        accuracy = self._accuracy[width]
        joins = tuple(
            allowed == self._head or (accuracy >= own and width in allowed)
            for allowed, own in zip(self._kinds.values(), self._own, strict=True)
        )
        if joins not in self._those_of:
            self._those_of[joins] = self._those(joins)
        self[width] = self._those_of[joins]
        return self[width]

    def _those(self, joins: Sequence[bool]) -> _Crowd:
        of_kind = dict(zip(self._kinds, joins, strict=True))
        mask = [of_kind[key] for key in self._ids]
        others = [*map(not_, mask)]
        others_due, others_lanes = [*compress(self._due, others)], bytes(compress(self._lanes, others))
        return _Crowd([*compress(count(), mask)], [*compress(self._due, mask)], others_due, others_lanes)


def sort_out(queue: QueueView, load: Load, profile: LatencyProfile, now: float) -> tuple[Sequence[int], Sequence[int]]:
    """Positions of those who may still be answered in time, and of those who cannot be, run alone now at their fastest
    width (or whose widths are not on offer)."""
    soonest = {widths: soonest_of(widths, load, profile, now) for widths in queue.kinds}
    places = range(len(queue.due))
    first, sure = (bisect_left(queue.due, instant) for instant in (min(soonest.values()), max(soonest.values())))
    late = [queue.due[i] < soonest[queue.widths[i]] for i in places[first:sure]]
    if not late:
        return places[sure:], places[:sure]
    alive = [i for i, is_late in zip(places[first:sure], late, strict=True) if not is_late]
    return [*alive, *places[sure:]], [*places[:first], *compress(places[first:sure], late)]
