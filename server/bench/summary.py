"""The figures of a run. Every arrival counts: refused, late or lost, it is a miss with an accuracy of 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scala_model.correctness import paired_difference, wilson_interval
from server.bench.records import NO_ANSWER, Records

MAX_LAG_MS, MAX_LAG_FAST_MS = 1.0, 2.0  # of the p99 of how late requests left; the second above ...
FAST = 1000.0  # ... so many requests a second

WASTED, ANSWERED = (f'scala_engine_seconds_total{{use="{use}"}}' for use in ("wasted", "answered"))
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Quantile:
    """A quantile of n values and its 95 % interval; an end is None where n values are too few to tell."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """Shares are of all requests, but ``attainment_admitted``; None stands for the figure of an empty set.

    ``attainment`` is by the client's clock, ``attainment_server`` by the server's. Intervals are of 95 %; those of
    shares (Wilson) take requests for independent, which in bursts they are not quite. ``late`` are answers after their
    budget; ``refusal`` is of how long a refusal took, ``lag`` of how late requests left, but the ``unsent``.
    ``wasted_engine_share`` of the engine's seconds went into answers that nobody got in time, by the server's
    ``counters``.
    """

    requests: int
    rate: float
    attainment: float
    attainment_ci95: Interval
    attainment_server: float
    attainment_admitted: float | None
    effective_accuracy: float
    effective_accuracy_ci95: Interval
    mean_width: float | None
    widths: Mapping[float, int]
    latency_p50_ms: Quantile | None
    latency_p99_ms: Quantile | None
    statuses: Mapping[int, int]
    late: int
    refusal_p99_ms: Quantile | None
    lag_p99_ms: Quantile
    lag_max_ms: float
    unsent: int
    wasted_engine_share: float | None

    @classmethod
    def of(cls, records: Records, counters: Mapping[str, float]) -> Summary:
        count, answered, in_time = len(records.workload), records.answered, records.in_time
        latency_ms, lag_ms = 1000 * records.latency_s, 1000 * records.lag_s[~records.unsent]
        lag = quantile(lag_ms, 0.99)
        assert lag is not None, "the first request always leaves"
        return cls(
            requests=count,
            rate=records.workload.rate,
            attainment=float(in_time.mean()),
            attainment_ci95=wilson_interval(int(in_time.sum()), count),
            attainment_server=float((answered & records.met).mean()),
            attainment_admitted=_mean(in_time[records.admitted]),
            effective_accuracy=float(records.effective.mean()),
            effective_accuracy_ci95=wilson_interval(int(records.effective.sum()), count),
            mean_width=_mean(records.width[answered]),
            widths=_counts(records.width[answered]),
            latency_p50_ms=quantile(latency_ms[answered], 0.5),
            latency_p99_ms=quantile(latency_ms[answered], 0.99),
            statuses=_counts(records.status),
            late=int((answered & ~in_time).sum()),
            refusal_p99_ms=quantile(latency_ms[~records.admitted], 0.99),
            lag_p99_ms=lag,
            lag_max_ms=float(lag_ms.max()),
            unsent=int(records.unsent.sum()),
            wasted_engine_share=_wasted_share(counters),
        )

    @property
    def max_lag_p99_ms(self) -> float:
        return MAX_LAG_FAST_MS if self.rate > FAST else MAX_LAG_MS

    @property
    def on_schedule(self) -> bool:
        """Whether the requests left as the workload says; otherwise the figures are of another workload."""
        return self.lag_p99_ms.value <= self.max_lag_p99_ms and not self.unsent

    def as_json(self) -> dict[str, Any]:
        """The figures, rounded to what was measured, and whether they count."""
        figures: dict[str, Any] = _rounded(asdict(self))
        return figures | {"on_schedule": self.on_schedule}


def off_schedule(summaries: Mapping[str, Summary]) -> list[str]:
    """A sentence for each run whose requests left late, or not all of them."""
    remedy = "keep a core free for this command, or ask for a lower rate"
    return [f"{name}: {_what_is_off(run)}: {remedy}" for name, run in summaries.items() if not run.on_schedule]


def _what_is_off(run: Summary) -> str:
    never = f"{run.unsent} requests never left because too many were open"
    if run.lag_p99_ms.value <= run.max_lag_p99_ms:
        return never
    late = f"requests left late, p99 {run.lag_p99_ms.value:.2f} ms where {run.max_lag_p99_ms:g} ms are allowed"
    return f"{late}, and {never}" if run.unsent else late


def quantile(values: NDArray[np.float64], q: float) -> Quantile | None:
    """The sample quantile and the order statistics around it that hold the true one in 95 of 100 samples.

    How many of n values lie below the true quantile is binomial (n, q), whatever their distribution (David and
    Nagaraja, Order Statistics, section 7.1). Each end errs in at most 2.5 of 100.
    """
    n, ordered = len(values), np.sort(values)
    if not n:
        return None
    below = _binomial_cdf(n, q)  # [k]: the chance that at most k do
    low, high = int((below <= 0.025).sum()), int((below < 0.975).sum()) + 1  # ranks from 1
    return Quantile(
        float(ordered[math.ceil(q * n) - 1]),
        float(ordered[low - 1]) if low >= 1 else None,
        float(ordered[high - 1]) if high <= n else None,
    )


def _binomial_cdf(n: int, q: float) -> NDArray[np.float64]:
    """At 0 to n, (n + 1)."""
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(n + 1)
    log_choices = log_factorials[n] - log_factorials - log_factorials[::-1]
    cdf: NDArray[np.float64] = np.cumsum(np.exp(log_choices + k * math.log(q) + (n - k) * math.log1p(-q)))
    return cdf


def gains(runs: Mapping[str, Sequence[Records]]) -> dict[str, tuple[float, float, float]]:
    """The first run's effective accuracy less that of each other, and the ends of its 95 % interval, by its name.

    All played the same workload, in as many rounds. They are paired request by request; one counts once, by its mean
    over the rounds. See ``paired_difference``.
    """
    first, *others = ((name, np.stack([one.effective for one in rounds], axis=1)) for name, rounds in runs.items())
    return {name: paired_difference(first[1], effective) for name, effective in others}


def table(summaries: Mapping[str, Summary]) -> list[list[str]]:
    """A heading with the runs' names, and a line for each figure."""
    runs = list(summaries.values())

    def line(name: str, *cells: str) -> list[str]:
        return [name, *cells]

    return [
        ["", *summaries],
        line("requests", *(f"{run.requests} ({run.rate:.1f}/s)" for run in runs)),
        line("effective accuracy, all", *(_share(run.effective_accuracy, run.effective_accuracy_ci95) for run in runs)),
        line("answered in budget, all", *(_share(run.attainment, run.attainment_ci95) for run in runs)),
        line("  by the server's clock", *(_share(run.attainment_server) for run in runs)),
        line("  of the admitted", *(_share(run.attainment_admitted) for run in runs)),
        line("mean width", *(_figure(run.mean_width, ".3f") for run in runs)),
        line("latency p50", *(_bounded(run.latency_p50_ms) for run in runs)),
        line("latency p99", *(_bounded(run.latency_p99_ms) for run in runs)),
        line("refused for load (429)", *(str(run.statuses.get(429, 0)) for run in runs)),
        line("refused as impossible (422)", *(str(run.statuses.get(422, 0)) for run in runs)),
        line("refusal p99", *(_bounded(run.refusal_p99_ms) for run in runs)),
        line("expired (504)", *(str(run.statuses.get(504, 0)) for run in runs)),
        line("answered late", *(str(run.late) for run in runs)),
        line("no answer", *(str(run.statuses.get(NO_ANSWER, 0)) for run in runs)),
        *([line("  never sent", *(str(run.unsent) for run in runs))] if any(run.unsent for run in runs) else []),
        line("other statuses", *(_others(run.statuses) for run in runs)),
        line("engine time wasted", *(_share(run.wasted_engine_share) for run in runs)),
        line("send lag p99", *(_bounded(run.lag_p99_ms) for run in runs)),
    ]


def _wasted_share(counters: Mapping[str, float]) -> float | None:
    wasted, answered = (counters.get(name, 0.0) for name in (WASTED, ANSWERED))
    return wasted / (wasted + answered) if wasted + answered else None


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if values.size else None


def _counts(values: NDArray[Any]) -> dict[Any, int]:
    kinds, counts = np.unique(values, return_counts=True)
    return dict(zip(kinds.tolist(), counts.tolist(), strict=True))


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_rounded(inner) for inner in value]
    return round(value, 5) if isinstance(value, float) else value


def _share(share: float | None, interval: Interval | None = None) -> str:
    around = "" if interval is None else f" ({100 * interval[0]:.2f} to {100 * interval[1]:.2f})"
    return _figure(None if share is None else 100 * share, ".2f", " %") + around


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _bounded(value: Quantile | None) -> str:
    if value is None:
        return "–"
    ends = f"{_figure(value.low, '.2f')} to {_figure(value.high, '.2f')}"
    return f"{value.value:.2f} ms ({ends})"


def _others(statuses: Mapping[int, int]) -> str:
    others = {status: count for status, count in statuses.items() if status not in (200, 422, 429, 504, NO_ANSWER)}
    return ", ".join(f"{status}: {count}" for status, count in others.items()) or "–"
