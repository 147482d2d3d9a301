"""Rules that trade accuracy for load: by the time that is left, by the rate of arrivals, by how busy the device is."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from server.simulation.baselines.rules import Choice, Rule
from server.simulation.baselines.table import Table

SWITCH_EVERY_S = 1.0

Switching = tuple[tuple[float, int], ...]  # requests/s, ascending, and the position of the width that is best for them


class Cheapest(Rule):
    """The width of least device time that is in time, of those with an accuracy of at least ``floor`` (INF-0, INF-a).

    Source: INFaaS (ATC 2021).
    """

    def __init__(self, table: Table, floor: float) -> None:
        super().__init__(table, tuple(w for w in table.cheapest_first() if table.accuracy[w] >= floor))

    def choose(self, due: Sequence[float], oldest_s: float, now: float) -> Choice | float:
        in_time = (Choice(width, self.table.num_in_time(width, due, now)) for width in self.widths)
        return next((choice for choice in in_time if choice.batch), self.at_most(self.widths[0], due))


class ModelSwitching(Rule):
    """Each second the width that ``switching`` has for the rate of the second before (MS).

    That is the entry of the least rate that is no lower. Before anything is known, the first entry holds. Source:
    Model-Switching (HotCloud 2020).
    """

    def __init__(self, table: Table, switching: Switching) -> None:
        if not switching:
            raise ValueError("MS knows no width for any rate: give Tuning.switching, which switching_table makes")
        self._rates, self._best = zip(*switching, strict=True)
        super().__init__(table, (self._best[0],))
        self._count, self._until_s = 0, SWITCH_EVERY_S

    def arrived(self, now: float) -> None:
        self._keep_up(now)
        self._count += 1

    def choose(self, due: Sequence[float], oldest_s: float, now: float) -> Choice | float:
        self._keep_up(now)
        return self.at_most(self.widths[0], due)

    def _keep_up(self, now: float) -> None:
        while now >= self._until_s:
            place = bisect_left(self._rates, self._count / SWITCH_EVERY_S)
            self.widths = (self._best[min(place, len(self._best) - 1)],)
            self._count = 0
            self._until_s += SWITCH_EVERY_S


class Bands(Rule):
    """Each ``period_s`` one width down if the device was busier than ``high``, one up if it was less busy than ``low``:
    the controller that comes to mind first (TH). Starts at the widest."""

    def __init__(self, table: Table, low: float, high: float, period_s: float) -> None:
        self._ladder = table.ladder()
        super().__init__(table, self._ladder[-1:])
        self._low, self._high, self._period_s = low, high, period_s
        self._step, self._until_s = len(self._ladder) - 1, period_s
        self._busy_s, self._running_since_s = 0.0, math.inf

    def arrived(self, now: float) -> None:
        self._keep_up(now)

    def choose(self, due: Sequence[float], oldest_s: float, now: float) -> Choice | float:
        self._keep_up(now)
        self._running_since_s = now
        return self.at_most(self.widths[0], due)

    def ran(self, choice: Choice, seconds: float, on_time: bool, now: float) -> None:
        self._keep_up(now)
        self._busy_s += now - self._running_since_s
        self._running_since_s = math.inf

    def _keep_up(self, now: float) -> None:
        while now >= self._until_s:
            if self._running_since_s < self._until_s:
                self._busy_s += self._until_s - self._running_since_s
                self._running_since_s = self._until_s
            self._turn(self._busy_s / self._period_s)
            self._busy_s = 0.0
            self._until_s += self._period_s

    def _turn(self, utilization: float) -> None:
        if utilization > self._high:
            self._step = max(self._step - 1, 0)
        elif utilization < self._low:
            self._step = min(self._step + 1, len(self._ladder) - 1)
        self.widths = (self._ladder[self._step],)


class ByDeadline(Rule):
    """Any width; the batch or the accuracy comes first. When no pair of width and batch is in time, as many as wait at
    the fastest width: those behind gain."""

    def __init__(self, table: Table, *, batch_first: bool) -> None:
        super().__init__(table, tuple(range(len(table.sizes))))
        self._fastest = min(self.widths, key=lambda width: table.p99_s[width][1])
        self._batch_first = batch_first

    def worth(self, pair: Choice) -> tuple[float, float]:
        accuracy = self.table.accuracy[pair.width]
        return (pair.batch, accuracy) if self._batch_first else (accuracy, pair.batch)

    def hurried(self, due: Sequence[float], now: float) -> Choice:
        batch = self.table.num_in_time(self._fastest, due, now)
        return Choice(self._fastest, batch) if batch else self.at_most(self._fastest, due)


class Greedy(ByDeadline):
    """The best of all pairs that are in time: the most accurate, and of those the largest (MA), or the other way round
    (MB). Source: SuperServe (NSDI 2025), where they are called MaxAcc and MaxBatch."""

    def choose(self, due: Sequence[float], oldest_s: float, now: float) -> Choice | float:
        pairs = [Choice(width, self.table.num_in_time(width, due, now)) for width in self.widths]
        best = max((pair for pair in pairs if pair.batch), key=self.worth, default=None)
        return best or self.hurried(due, now)


class SlackFit(ByDeadline):
    """The best pair, by batch (SF-b) or accuracy (SF-a), of the bucket of latencies that is closest below the time left
    to the first image.

    ``num_buckets`` buckets of even widths hold all measured pairs; each lasts as long as the longest in it. Pairs of
    more images than the measured size that holds all who wait are left out: for a short queue they would choose a
    narrow width in favour of nobody. Source: SuperServe (NSDI 2025).
    """

    def __init__(self, table: Table, num_buckets: int, *, batch_first: bool) -> None:
        super().__init__(table, batch_first=batch_first)
        self._sizes = sorted({size for sizes in table.sizes for size in sizes})
        self._buckets = [self._bucketed(size, num_buckets) for size in self._sizes]

    def choose(self, due: Sequence[float], oldest_s: float, now: float) -> Choice | float:
        longest_s, best = self._buckets[min(bisect_left(self._sizes, len(due)), len(self._sizes) - 1)]
        bucket = bisect_right(longest_s, due[0] - now) - 1
        if bucket < 0:
            return self.hurried(due, now)
        width, batch = best[bucket]
        return Choice(width, min(batch, len(due)))

    def _bucketed(self, most: int, num_buckets: int) -> tuple[list[float], list[Choice]]:
        """Of each bucket with a pair of at most ``most`` images: how long it lasts, ascending, and its best pair."""
        seconds = {Choice(w, size): self.table.p99_s[w][size] for w in self.widths for size in self.table.sizes[w]}
        shortest_s, longest_s = min(seconds.values()), max(seconds.values())
        buckets: dict[int, list[Choice]] = {}
        for pair in sorted((pair for pair in seconds if pair.batch <= most), key=seconds.__getitem__):
            share = (seconds[pair] - shortest_s) / (longest_s - shortest_s or 1.0)
            buckets.setdefault(min(int(share * num_buckets), num_buckets - 1), []).append(pair)
        return [seconds[pairs[-1]] for pairs in buckets.values()], [max(b, key=self.worth) for b in buckets.values()]
