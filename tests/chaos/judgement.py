"""What a soak is judged by: the trends of samples of a server that was under the same load all along.

A judgement is a function of numbers, so that it can be tried on a server that leaks on purpose. Trends are Theil and
Sen's: the median of the slopes between all pairs of samples, which a quarter of the samples may spoil.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

WARM_UP_REQUESTS = 10_000  # pools and caches fill meanwhile
LEAST_SAMPLES = 4
LATE_S = 1.0  # a request that left so late: it was the machine that stood still, not the server
# What is allowed of every 10,000 requests. The allocator moves memory by more than its trend in a few minutes.
MAX_MIB, MAX_DESCRIPTORS, MAX_THREADS = 1.0, 0.5, 0.25
MAX_DEARER = 0.25  # from the first sample to the last, as a share of the median
# Throughput and attainment lost from the first sample to the last, and attainment at the median one. These depend on
# who else is on the machine, too, and neighbours come and go for minutes: few samples are judged by wider bounds.
MANY_SAMPLES = 100  # as of 17 minutes
MANY_MAX_SLOWER, MANY_MAX_SINKING, MANY_LEAST_ATTAINMENT = 0.25, 0.15, 0.85  # measured: 0.01, 0.01, 0.96
FEW_MAX_SLOWER, FEW_MAX_SINKING, FEW_LEAST_ATTAINMENT = 0.5, 0.25, 0.7  # measured alone: 0.26, 0.05, 0.95


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at the end of one period of load, with no connection open; ``requests`` since the start.

    ``throughput`` is images/s of callers without pause and ``cpu_ms`` what each of those took of the processor;
    ``attainment`` is a share of the arrivals at 80 % of that, and ``lag_s`` how late the latest of them left.
    """

    at_s: float
    requests: int
    memory_mib: float
    descriptors: int
    threads: int
    throughput: float
    cpu_ms: float
    attainment: float
    lag_s: float


@dataclass(frozen=True, slots=True)
class Trends:
    """Per 10,000 requests, but for ``dearer``, ``slower`` and ``sinking``: what requests take more of the processor and
    what is lost of throughput and of attainment, over all samples, as a share of the median."""

    mib: float
    descriptors: float
    threads: float
    dearer: float
    slower: float
    sinking: float
    attainment: float
    num_samples: int


def trends(samples: Sequence[Sample], warm_up: int = WARM_UP_REQUESTS) -> Trends:
    """Raises ValueError where too few samples are left without the warm-up and the generator's own halts."""
    fair = [sample for sample in samples if sample.requests >= warm_up and sample.lag_s < LATE_S]
    if len(fair) < LEAST_SAMPLES:
        raise ValueError(f"{len(fair)} of {len(samples)} samples can be judged, {LEAST_SAMPLES} are needed")
    work = [sample.requests / 10_000 for sample in fair]
    return Trends(
        mib=slope(work, [sample.memory_mib for sample in fair]),
        descriptors=slope(work, [sample.descriptors for sample in fair]),
        threads=slope(work, [sample.threads for sample in fair]),
        dearer=change(work, [sample.cpu_ms for sample in fair]),
        slower=-change(work, [sample.throughput for sample in fair]),
        sinking=-change(work, [sample.attainment for sample in fair]),
        attainment=median(sample.attainment for sample in fair),
        num_samples=len(fair),
    )


def complaints(found: Trends) -> list[str]:
    """What is wrong with a server of these trends, in words; nothing if it may go on for ever."""
    max_slower, max_sinking, least_attainment = (
        (MANY_MAX_SLOWER, MANY_MAX_SINKING, MANY_LEAST_ATTAINMENT)
        if found.num_samples >= MANY_SAMPLES
        else (FEW_MAX_SLOWER, FEW_MAX_SINKING, FEW_LEAST_ATTAINMENT)
    )
    said = {
        f"memory grows by {found.mib:.2f} MiB in 10,000 requests": found.mib > MAX_MIB,
        f"descriptors grow by {found.descriptors:.2f} in 10,000 requests": found.descriptors > MAX_DESCRIPTORS,
        f"threads grow by {found.threads:.2f} in 10,000 requests": found.threads > MAX_THREADS,
        f"requests take {found.dearer:.0%} more of the processor": found.dearer > MAX_DEARER,
        f"throughput fell by {found.slower:.0%}": found.slower > max_slower,
        f"attainment fell by {found.sinking:.0%}": found.sinking > max_sinking,
        f"only {found.attainment:.1%} were answered in time": found.attainment < least_attainment,
    }
    return [sentence for sentence, wrong in said.items() if wrong]


def change(xs: Sequence[float], ys: Sequence[float]) -> float:
    """From the first to the last, by their trend, as a share of the median."""
    return slope(xs, ys) * (xs[-1] - xs[0]) / median(ys)


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Theil and Sen's; at least two different ``xs``."""
    pairs = combinations(zip(xs, ys, strict=True), 2)
    return median((b - a) / (x - w) for (w, a), (x, b) in pairs if x != w)
