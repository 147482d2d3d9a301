"""Rules that never change their width: how others' servers form a batch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from server.simulation.baselines.rules import Choice, Rule
from server.simulation.baselines.table import Table

BACK_OFF = 0.9


class Fixed(Rule):
    """Whoever waits, up to the largest batch (F-w, AS-w)."""

    def __init__(self, table: Table, width: int) -> None:
        super().__init__(table, (width,))
        self.width = width

    def choose(self, due: Sequence[float], oldest_s: float, now: float) -> Choice | float:
        return self.at_most(self.width, due)


class Delayed(Fixed):
    """A full batch, or what there is when the oldest has waited for ``delay_s``: a dynamic batcher (TR-w)."""

    def __init__(self, table: Table, width: int, delay_s: float) -> None:
        super().__init__(table, width)
        self._delay_s = delay_s

    def choose(self, due: Sequence[float], oldest_s: float, now: float) -> Choice | float:
        full, ripe_s = len(due) >= self.table.max_batch(self.width), oldest_s + self._delay_s
        return self.at_most(self.width, due) if full or now >= ripe_s else ripe_s


class Aimd(Fixed):
    """At most a number that grows by 1 with each batch that was on time and else shrinks by a tenth (C+-w).

    Source: Clipper (NSDI 2017).
    """

    def __init__(self, table: Table, width: int) -> None:
        super().__init__(table, width)
        self._limit = 1.0

    def choose(self, due: Sequence[float], oldest_s: float, now: float) -> Choice | float:
        return Choice(self.width, min(len(due), int(self._limit)))

    def ran(self, choice: Choice, seconds: float, on_time: bool, now: float) -> None:
        grown = min(self._limit + 1, self.table.max_batch(self.width))
        self._limit = grown if on_time else max(1.0, BACK_OFF * self._limit)


class Clockwork(Fixed):
    """The largest measured size up to which none, in growing, makes anybody in the batch late (CW-w).

    A size takes the 99th percentile of its last ``window`` batches, of which the profile's is the first. Source:
    Clockwork (OSDI 2020).
    """

    def __init__(self, table: Table, width: int, window: int) -> None:
        super().__init__(table, width)
        self._seen = {size: deque([table.p99_s[width][size]], maxlen=window) for size in table.sizes[width]}
        self._seconds = {size: seen[0] for size, seen in self._seen.items()}

    def choose(self, due: Sequence[float], oldest_s: float, now: float) -> Choice | float:
        batch = 1
        for size, seconds in self._seconds.items():
            if size > len(due) or now + seconds > min(due[:size]):
                break
            batch = size
        return Choice(self.width, batch)

    def ran(self, choice: Choice, seconds: float, on_time: bool, now: float) -> None:
        if (seen := self._seen.get(choice.batch)) is not None:  # a queue may have cut the batch to another size
            seen.append(seconds)
            self._seconds[choice.batch] = sorted(seen)[math.ceil(99 * len(seen) / 100) - 1]  # nearest rank

    def alone_s(self) -> float:
        return self._seconds[1]
