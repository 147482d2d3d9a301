"""Timing that is fair to all on a machine whose speed drifts: everything that is compared takes turns in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from typing import TypeVar

import torch

MIN_ROUNDS = 5
TURN_S, MAX_RUNS = 0.1, 20  # a turn's measured runs: as many as the slowest does in this time, at most so many
# Before a turn: a runtime's threads go on looking for work after its last run, and cost the next one's a tenth of 2 ms.
REST_S = 0.05
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
Clock = Callable[[], float]
Key = TypeVar("Key")


def in_turns(
    runs: Mapping[str, Callable[[], object]],
    budget_s: float,
    clock: Clock = time.perf_counter,
    rest: Callable[[float], None] = time.sleep,
) -> dict[str, float]:
    """Median seconds of each run. They take turns until ``budget_s`` is spent, and five times at least.

    A turn begins with a rest, for the other's threads to fall asleep, and with a run that is not counted, for each to
    find its own weights in the caches. All have the same number of counted runs in every round: what the machine does
    then, it does to all.
    """
    end = clock() + budget_s
    slowest_s = max(seconds(run, clock) for run in runs.values())
    num_runs = max(1, min(MAX_RUNS, int(TURN_S / slowest_s)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    rounds = 0
    while rounds < MIN_ROUNDS or clock() < end:
        for name, run in runs.items():
            rest(REST_S)
            run()
            found[name] += [seconds(run, clock) for _ in range(num_runs)]
        rounds += 1
    return {name: statistics.median(times) for name, times in found.items()}


def seconds(run: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """How long one run takes."""
    started = clock()
    run()
    return clock() - started


def switch_cost(
    run: Callable[[Key], object], pairs: Sequence[tuple[Key, Key]], repeats: int, clock: Clock = time.perf_counter
) -> float:
    """Seconds that a run takes longer after another width than after its own: A in B A A, the first less the second.

    The median of the repeats, averaged over both orders of all pairs.
    """
    costs = []
    for one, other in (order for pair in pairs for order in permutations(pair)):
        differences = []
        for _ in range(repeats):
            run(other)
            switched = seconds(lambda: run(one), clock)  # noqa: B023
            differences.append(switched - seconds(lambda: run(one), clock))  # noqa: B023
        costs.append(statistics.median(differences))
    return statistics.fmean(costs)


@torch.inference_mode()
def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """FLOP/s of a large square matrix product: the best of the repeats, for it stands for what the device can do."""
    size = MATMUL_SIZE[device.type]
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))

    def product() -> None:
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    product()
    return 2 * size**3 / min(seconds(product) for _ in range(repeats))
