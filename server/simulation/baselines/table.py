"""What every baseline knows of the device: one latency table, the same for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import accumulate

from server.latency_profile import LatencyProfile

Seconds = tuple[tuple[float, ...], ...]  # [width][batch]; a batch of 0 takes 0, and one more image never takes less


@dataclass(frozen=True, slots=True)
class Table:
    """Numbers of ``profile``. A width is its position in ``profile.widths``; ``sizes``: the batches measured of it."""

    profile: LatencyProfile
    p50_s: Seconds
    p99_s: Seconds
    sizes: tuple[tuple[int, ...], ...]
    accuracy: tuple[float, ...]

    def max_batch(self, width: int) -> int:
        return self.sizes[width][-1]

    def cost_s(self, width: int) -> float:
        """Device time of one image in the batch where that is least."""
        return min(self.p50_s[width][size] / size for size in self.sizes[width])

    def cheapest_first(self) -> list[int]:
        return sorted(range(len(self.sizes)), key=self.cost_s)

    def ladder(self) -> tuple[int, ...]:
        """The widths of which each is more accurate than all that cost less, the cheapest first."""
        steps: list[int] = []
        for width in self.cheapest_first():
            if not steps or self.accuracy[width] > self.accuracy[steps[-1]]:
                steps.append(width)
        return tuple(steps)

    def num_in_time(self, width: int, due: Sequence[float], now: float) -> int:
        """How many of those that wait, from the first on, one batch can take and make none of them late; may be 0."""
        earliest, seconds, count = math.inf, self.p99_s[width], 0
        for batch, instant in enumerate(due[: self.max_batch(width)], 1):
            earliest = min(earliest, instant)
            if now + seconds[batch] > earliest:
                break
            count = batch
        return count


def table_of(profile: LatencyProfile) -> Table:
    """The table of a profile as it is now: whoever goes on measuring into the profile does not change it.

    Raises ValueError for a width that no batch was measured of.
    """
    if missing := [str(width) for width in profile.widths if not profile.ready(width)]:
        raise ValueError(f"the profile has no batch of width {', '.join(missing)}: measure it, or leave the width out")
    profile = deepcopy(profile)
    batches = [range(1, profile.max_batch(width) + 1) for width in profile.widths]
    rows = list(zip(profile.widths, batches, strict=True))
    return Table(
        profile,
        tuple((0.0, *accumulate((profile.p50(width, b) for b in sizes), max)) for width, sizes in rows),
        tuple((0.0, *accumulate((profile.p99(width, b) for b in sizes), max)) for width, sizes in rows),
        tuple(profile.warmed(width) for width in profile.widths),
        tuple(profile.accuracy[width] for width in profile.widths),
    )
