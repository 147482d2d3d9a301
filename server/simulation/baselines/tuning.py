"""What the rules leave open, and what to try for each before it is compared: the same effort for all."""

from __future__ import annotations

from dataclasses import dataclass, replace

from server.simulation.baselines.variable_width import Switching

EDF = "+EDF"  # what ends the name of a rule in the queue that is the same for all


@dataclass(frozen=True, slots=True)
class Tuning:
    """What the rules leave open; the defaults are what is tried first. Raises ValueError for what cannot be meant.

    ``delay_s``: how long the oldest waits for others (TR). ``window``: batches that a size's 99th percentile is taken
    of (CW). ``floor``: the least accuracy, from 0, the least accurate width's, to 1, the most accurate one's (INF-a).
    ``low``, ``high`` and ``period_s``: shares of the time that the device is busy, and how often they are looked at
    (TH). ``buckets``: of latencies (SF). ``switching``: which width for which rate, from ``switching_table`` (MS).
    """

    delay_s: float = 0.005
    window: int = 100
    floor: float = 0.5
    low: float = 0.5
    high: float = 0.8
    period_s: float = 0.5
    buckets: int = 16
    switching: Switching = ()

    def __post_init__(self) -> None:
        _check(0 <= self.delay_s < 60, f"a delay of {self.delay_s} s", "give 0 to 60")
        _check(self.window >= 1, f"a window of {self.window} batches", "give 1 or more")
        _check(0 <= self.floor <= 1, f"a floor of {self.floor}", "give a share of the accuracies' range, 0 to 1")
        _check(0 <= self.low < self.high <= 1, f"bands {self.low} to {self.high}", "let 0 <= low < high <= 1")
        _check(self.period_s > 0, f"a period of {self.period_s} s", "give a number above 0")
        _check(self.buckets >= 1, f"{self.buckets} buckets", "give 1 or more")
        _check(list(self.switching) == sorted(self.switching), f"switching {self.switching}", "let the rates ascend")


def tunings(name: str, tuning: Tuning) -> tuple[Tuning, ...]:
    """What to try for this scheduler on a training workload; ``tuning`` itself where there is nothing to tune."""
    match name.removesuffix(EDF).partition("-")[0], name.removesuffix(EDF):
        case "TR", _:
            return tuple(replace(tuning, delay_s=s) for s in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05))
        case "CW", _:
            return tuple(replace(tuning, window=n) for n in (10, 30, 100))
        case _, "INF-a":
            return tuple(replace(tuning, floor=share) for share in (0.25, 0.5, 0.75, 0.9))
        case "TH", _:
            bands = ((0.3, 0.6), (0.5, 0.8), (0.6, 0.9), (0.7, 0.95))
            return tuple(
                replace(tuning, low=low, high=high, period_s=s) for low, high in bands for s in (0.1, 0.25, 0.5, 1.0)
            )
        case "SF", _:
            return tuple(replace(tuning, buckets=count) for count in (2, 4, 8, 16, 32, 64, 128))
        case _:
            return (tuning,)


def _check(holds: bool, what: str, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{what}: {remedy}")
