"""Measured latency of every (width, batch bucket), refined online. Pure numbers: no clock, no engine.

A cell exists once it was warmed; only then may a policy use it. Its p50 follows what undisturbed batches take, so that
a noisy neighbour does not become part of what the machine is believed to be able to do. Its p99 is 1.5 x p50 until it
has samples of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from statistics import median
from typing import NamedTuple

from scala_model.width import Width

SAMPLES = 200  # kept of a cell; its p99 is then the third largest
MIN_SAMPLES = 20


def buckets_up_to(max_batch: int) -> tuple[int, ...]:
    """The profiled batch sizes: powers of two and ``max_batch`` itself."""
    return tuple(sorted({*(1 << k for k in range(max_batch.bit_length()) if 1 << k <= max_batch), max_batch}))


class Row(NamedTuple):
    """Seconds of a batch of so many images."""

    batch: int
    p50_s: float
    p99_s: float


@dataclass(slots=True)
class Cell:
    """Latency of one width at one batch size, in seconds."""

    samples: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    p50_s: float = 0.0
    p99_s: float = 0.0

    def add(self, seconds: Iterable[float]) -> None:
        self.samples.extend(seconds)
        ordered = sorted(self.samples)
        self.p50_s = median(ordered)
        enough = len(ordered) >= MIN_SAMPLES
        self.p99_s = ordered[int(0.99 * (len(ordered) - 1))] if enough else 1.5 * self.p50_s


class LatencyProfile:
    """``accuracies`` order the widths; a width that was never evaluated counts as accurate as it is wide."""

    def __init__(self, accuracies: Mapping[Width, float | None], max_batch: int) -> None:
        measured = {width: float(width) if value is None else value for width, value in accuracies.items()}
        self.accuracy: dict[Width, float] = dict(sorted(measured.items()))
        self.widths = tuple(self.accuracy)
        self.buckets = buckets_up_to(max_batch)
        self.fastest = self.widths[0]
        self.by_speed: tuple[Width, ...] = ()  # the ready ones, the most images a second first
        self.by_latency: tuple[Width, ...] = ()  # the same, the least time for one image first
        self._cells: dict[tuple[Width, int], Cell] = {}
        self._dominated: dict[int, frozenset[Width]] = {}
        self._rows: dict[Width, tuple[Row, ...]] = {}

    def record(self, width: Width, batch: int, seconds: Iterable[float]) -> None:
        """Add latencies of a batch that nothing disturbed.

        A batch between two buckets counts for the upper one, as much longer as the profile says that it would take.
        """
        bucket = self._bucket(batch)
        longer = self.p50(width, bucket) / self.p50(width, batch) if (width, bucket) in self._cells else 1.0
        self._cells.setdefault((width, bucket), Cell()).add(longer * sample for sample in seconds)
        self._refresh(width, bucket)

    def withdraw(self, width: Width, batch: int) -> None:
        """Take a cell and the larger ones of its width off the offer until they are recorded again.

        That is for a device without the memory for them. A width whose batch 1 is withdrawn is not ready any more.
        """
        for bucket in self.buckets[self.buckets.index(self._bucket(batch)) :]:
            self._cells.pop((width, bucket), None)
            self._refresh(width, bucket)

    def cell(self, width: Width, bucket: int) -> Cell | None:
        return self._cells.get((width, bucket))

    def cells(self) -> Mapping[tuple[Width, int], Cell]:
        """All of them by (width, bucket), to be read before the next record."""
        return self._cells

    def samples(self) -> dict[tuple[Width, int], list[float]]:
        """The seconds that every (width, bucket) was seen to take, oldest first."""
        return {place: list(cell.samples) for place, cell in self._cells.items()}

    def rows(self, width: Width) -> tuple[Row, ...]:
        """The batch sizes on offer at this width, ascending, and their seconds."""
        rows = self._rows.get(width)
        if rows is None:
            cells = ((bucket, self._cells[width, bucket]) for bucket in self.warmed(width))
            self._rows[width] = rows = tuple(Row(bucket, cell.p50_s, cell.p99_s) for bucket, cell in cells)
        return rows

    def ready(self, width: Width) -> bool:
        """Whether the width may be used at all: batch 1 is warmed."""
        return (width, 1) in self._cells

    def warmed(self, width: Width) -> tuple[int, ...]:
        """The batch sizes on offer at this width: every bucket up to the first that is not warmed yet."""
        return tuple(takewhile(lambda bucket: (width, bucket) in self._cells, self.buckets))

    def max_batch(self, width: Width) -> int:
        """The largest batch on offer; 0 when the width is not ready."""
        return max(self.warmed(width), default=0)

    def p50(self, width: Width, batch: int) -> float:
        return self._between(width, batch, "p50_s")

    def p99(self, width: Width, batch: int) -> float:
        """Seconds for ``batch`` images at ``width``; between two buckets as the upper one, or as the lower one and the
        rest by themselves if that is less."""
        return self._between(width, batch, "p99_s")

    def best_batch(self, width: Width, longest_s: float = float("inf")) -> int:
        """The warmed batch of least time per image whose p99 stays within ``longest_s``; 1 if none does."""
        fitting = (row for row in self.rows(width) if row.p99_s <= longest_s)
        return min(fitting, key=lambda row: row.p50_s / row.batch, default=Row(1, 0.0, 0.0)).batch

    def seconds_per_image(self, width: Width, longest_s: float = float("inf")) -> float:
        batch = self.best_batch(width, longest_s)
        return self.p50(width, batch) / batch

    def dominated_at(self, batch: int) -> frozenset[Width]:
        """The widths that another matches in accuracy without being slower at this batch size's bucket.

        It depends on the size: on a GPU one image takes as long at every width, a large batch does not.
        """
        return self._dominated.get(self._bucket(batch), frozenset())

    def _refresh(self, width: Width, bucket: int) -> None:
        """A cell has changed: find out which widths are dominated at its bucket, and which are the fastest."""
        self._rows.pop(width, None)
        self.by_speed = tuple(sorted(filter(self.ready, self.widths), key=self.seconds_per_image))
        self.by_latency = tuple(sorted(self.by_speed, key=lambda ready: self._cells[ready, 1].p50_s))
        self.fastest = self.by_speed[0] if self.by_speed else self.widths[0]
        measured = [(self._cells[w, bucket].p50_s, -self.accuracy[w], w) for w in self.widths if self.cell(w, bucket)]
        dominated, best = set[Width](), -float("inf")
        for _, inaccuracy, width in sorted(measured):  # of two equals the narrower comes first, and stays
            if -inaccuracy <= best:
                dominated.add(width)
            best = max(best, -inaccuracy)
        self._dominated[bucket] = frozenset(dominated)

    def _bucket(self, batch: int) -> int:
        return self.buckets[min(bisect_left(self.buckets, batch), len(self.buckets) - 1)]

    def _between(self, width: Width, batch: int, quantile: str) -> float:
        upper = self._bucket(batch)
        high: float = getattr(self._cells[width, upper], quantile)
        if upper == batch or upper == 1:
            return high
        lower = self.buckets[self.buckets.index(upper) - 1]
        low: float = getattr(self._cells[width, lower], quantile)
        return max(low, min(high, low + self._between(width, batch - lower, quantile)))
