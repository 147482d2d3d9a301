"""How long the adaptive policy takes to decide while many images wait.

    python -m benchmarks.decision [--waiting N] [--situations N] [--repeats N] [--seed N]

Situations are drawn by chance for both built-in machines of the simulator, at several rates of arrival. Deadlines lie
in the next 50, 100 or 200 ms, or further ahead where admission would not have let in so many. In a uniform queue all
images allow every width. Of a mixed one three in ten have a wish: for the upper half of the widths, for the narrowest,
or for the widest one.

Each situation is decided several times in a row and its median counts, so that what else this machine does is left out.
Prints a table and, last, one line of JSON, in microseconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.policies.adaptive import Adaptive
from server.policies.deadlines import fits
from server.policies.plan import Plan, make_plan
from server.simulation.machines import built_in
from server.types import Load, QueueView

MACHINES, RATES = ("cpu", "gpu"), (0.5, 1.0, 2.0, 4.0)  # rates in capacities of the widest width
LATEST_S = (0.05, 0.1, 0.2)  # deadlines
BUDGETS_S, MAX_WAITING = [0.04 + 0.16 * i / 15 for i in range(16)], 256
HOP_S = RESPOND_S = 0.0003
Kinds = Sequence[tuple[Width, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, default=100)
    parser.add_argument("--situations", type=int, default=300, help="of each kind")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results = {}
    print(f"{'machine':8} {'queue':8} {'rate':>5} {'median µs':>10} {'p99 µs':>8}   hurried")
    for name in MACHINES:
        machine = built_in(name)
        profile = machine.profile()
        policy = Adaptive(_plan(profile))
        for queue, kinds in (("uniform", [profile.widths]), ("mixed", _wishes(profile.widths))):
            for rate in RATES:
                load = Load(rate * machine.capacity, 1.0, HOP_S, RESPOND_S)
                drawn = situations(kinds, load, profile, options.waiting, random.Random(options.seed))
                taken_us, hurried = measure(policy, drawn, load, profile, options.situations, options.repeats)
                median, p99 = statistics.median(taken_us), statistics.quantiles(taken_us, n=100)[-1]
                print(f"{name:8} {queue:8} {rate:5g} {median:10.1f} {p99:8.1f}   {hurried:.0%}")
                results[f"{name}, {queue}, {rate:g}x"] = {"median_us": round(median, 1), "p99_us": round(p99, 1)}
    about = {"python": platform.python_version(), "processor": platform.machine(), **vars(options)}
    print(json.dumps(about | {"decisions": results}))


def situations(
    kinds: Kinds, load: Load, profile: LatencyProfile, waiting: int, chance: random.Random
) -> Iterator[QueueView]:
    """Endless. Deadlines lie anywhere up to an instant that moves away with each one that could not be met."""
    start_s = load.hop_s + load.respond_s
    while True:
        latest_s, due, widths = chance.choice(LATEST_S), list[float](), list[tuple[Width, ...]]()
        queue = QueueView(due, widths, kinds_waiting := Counter[tuple[Width, ...]]())
        while len(due) < waiting:
            newcomer, allowed = chance.uniform(0, latest_s), chance.choice(kinds)
            if fits(queue, newcomer, allowed, start_s, load, profile):
                place = bisect_right(due, newcomer)
                due.insert(place, newcomer)
                widths.insert(place, allowed)
                kinds_waiting[allowed] += 1
            else:
                latest_s *= 1.001
        yield queue


def measure(
    policy: Adaptive,
    drawn: Iterator[QueueView],
    load: Load,
    profile: LatencyProfile,
    count: int,
    repeats: int,
) -> tuple[list[float], float]:
    """Microseconds of each decision, and the share of those in which somebody could not be served in time."""
    taken_us, hurried = [], 0
    for _ in range(count):
        queue, runs = next(drawn), []
        for _ in range(repeats):
            started = time.perf_counter_ns()
            decision = policy(queue, load, profile, 0.0)
            runs.append((time.perf_counter_ns() - started) / 1000)
        taken_us.append(statistics.median(runs))
        hurried += decision.reason == "hurried"
    return taken_us, hurried / count


def _plan(profile: LatencyProfile) -> Plan:
    seconds = [[(row.batch, row.p50_s) for row in profile.rows(width)] for width in profile.widths]
    return make_plan(seconds, list(profile.accuracy.values()), BUDGETS_S, MAX_WAITING)


def _wishes(widths: tuple[Width, ...]) -> Kinds:
    return [widths] * 7 + [widths[len(widths) // 2 :], widths[:1], widths[-1:]]


if __name__ == "__main__":
    main()
