"""How requests wait: in which order, who is refused, who is dropped. Each runs any rule; each is a scheduler."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from server.policies.deadlines import admissible
from server.simulation.baselines.rules import Choice, Rule
from server.simulation.simulator import Batch
from server.types import Load, QueueView


class Fifo:
    """Served in the order of arrival. Who finds ``max_images`` that wait or are being decoded is refused, and nobody
    else: an image that is late by now is run like any other."""

    def __init__(self, rule: Rule, max_images: int) -> None:
        self.rule, self.table, self._max_images = rule, rule.table, max_images

    def start(self, arrivals_s: Sequence[float], deadlines_s: Sequence[float]) -> None:
        self._arrivals_s, self._deadlines_s = arrivals_s, deadlines_s
        self._due: list[float] = []
        self._images: list[int] = []
        self._preparing: set[int] = set()
        self._last_arrived = -1

    def admits(self, image: int, now: float, device_free_at: float) -> bool:
        free_at = max(now, device_free_at)
        if image <= self._last_arrived:  # it has been decoded
            self._preparing.discard(image)
            return self._admits(image, now, free_at)
        self._last_arrived = image
        self.rule.arrived(now)
        if len(self._due) + len(self._preparing) >= self._max_images or not self._admits(image, now, free_at):
            return False
        self._preparing.add(image)
        return True

    def queued(self, image: int, now: float) -> None:
        self._preparing.discard(image)
        place = self._place(self._deadlines_s[image])
        self._due.insert(place, self._deadlines_s[image])
        self._images.insert(place, image)

    def next_batch(self, now: float) -> Batch | float | None:
        self._drop(self._too_late_s(now))
        if not self._due:
            return None
        choice = self.rule.choose(self._due, self._arrivals_s[min(self._images)], now)
        if not isinstance(choice, Choice):
            return choice
        width, batch = choice.width, self._cut(choice, now)
        images = self._images[:batch]
        del self._due[:batch], self._images[:batch]
        return Batch(width, images, self.table.p99_s[width][batch])

    def ran(self, batch: Batch, seconds: float, now: float) -> None:
        on_time = all(now <= self._deadlines_s[image] for image in batch.images)
        self.rule.ran(Choice(batch.width, len(batch.images)), seconds, on_time, now)

    def _admits(self, image: int, now: float, free_at: float) -> bool:
        return True

    def _place(self, due: float) -> int:
        return len(self._due)

    def _too_late_s(self, now: float) -> float:
        """Who waits for an earlier deadline than this is dropped when a batch forms."""
        return -math.inf

    def _cut(self, choice: Choice, now: float) -> int:
        return choice.batch

    def _drop(self, too_late_s: float) -> None:
        if self._due and min(self._due) < too_late_s:
            kept = [place for place, due in enumerate(self._due) if due >= too_late_s]
            self._due, self._images = [self._due[i] for i in kept], [self._images[i] for i in kept]


class Expiring(Fifo):
    """Whose deadline has passed is dropped, which is noticed when a batch forms only."""

    def _too_late_s(self, now: float) -> float:
        return now


class Hopeless(Fifo):
    """Who could not be in time even alone is dropped when a batch forms."""

    def _too_late_s(self, now: float) -> float:
        return now + self.rule.alone_s()


class Predicting(Fifo):
    """Who would be late behind those that are ahead, served in full batches in the median, is refused."""

    def _admits(self, image: int, now: float, free_at: float) -> bool:
        width = self.rule.widths[0]
        ahead = len(self._due) + sum(other < image for other in self._preparing)
        most = self.table.max_batch(width)
        before_s = ahead // most * self.table.p50_s[width][most]
        return free_at + before_s + self.table.p99_s[width][ahead % most + 1] <= self._deadlines_s[image]


class Edf(Fifo):
    """The earliest deadline first; nobody is dropped."""

    def _place(self, due: float) -> int:
        return bisect_right(self._due, due)


class Punctual(Edf):
    """The earliest deadline first, admission as the server does it, and no device time for whom it would not help.

    Both admission and early drop are judged at the fastest of the widths that the rule may use; a batch that would make
    its first image late is cut.
    """

    def _admits(self, image: int, now: float, free_at: float) -> bool:
        widths = tuple(self.table.profile.widths[width] for width in self.rule.widths)
        waiting = len(self._due)
        return admissible(
            self._deadlines_s[image],
            widths,
            QueueView(self._due, [widths] * waiting, {widths: waiting} if waiting else {}),
            Load(),
            self.table.profile,
            now=now,
            free_at=free_at,
            decoded_at=now,
            preparing=len(self._preparing),
        )

    def _too_late_s(self, now: float) -> float:
        return now + self.rule.alone_s()

    def _cut(self, choice: Choice, now: float) -> int:
        return min(choice.batch, max(1, self.table.num_in_time(choice.width, self._due, now)))
