"""The adaptive server against fixed widths and other policies, live, on labelled images; and beside its simulation.

Every policy gets the same requests. The network is the embedded checkpoint, made heavier without changing its answers
(``heavier.py``): as shipped, its widths cost less than their HTTP requests, and which is run would hardly matter. Run:
``make bench-adaptive``. The last line is JSON. Ends with 1 when requests left late or not at all: then the figures are
of another workload.

Twelve runs of a minute, six policies on two workloads, in turns of a quarter of it, and two minutes for all else: every
server is started once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.heavier import EXTRA_DEPTH, MLP_FACTOR, heavier
from scala_model.checkpoint import default_checkpoint
from scala_model.width import Width
from server.bench.client import Client, Reply, closed_loop
from server.bench.compare import Running, available_cpus, pinned, serving, take_turns, urgent
from server.bench.photos import open_photos, take
from server.bench.play import Played, run
from server.bench.plot import plot_run
from server.bench.records import joined
from server.bench.summary import Summary, gains, off_schedule
from server.console import progress
from server.simulation.baselines import Tuning
from server.simulation.device import Machine, SimulatedDevice
from server.simulation.experiment import OURS, Result, judge, policies
from server.simulation.machines import read_machine
from server.simulation.simulator import simulate
from server.simulation.workload import Workload, make_workload

BUDGETS = "40-200"
CAPACITY_S, CONCURRENCY, OVERLOAD_S = 5.0, 16, 15.0
OVER_WIDEST, OVER_NARROWEST = 1.5, 3.0  # times the capacity
PARTS = 4  # of a workload: all policies play one before the next, every other time backwards, as the machine drifts
WINDOW_S, MOST_TAKEN = 0.05, 0.9  # around an instant, and the share of a core that the event loop takes there at most
Servers = Callable[[str], Running]  # of a policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("SCALA_DATA_DIR", "../shared/data")))
    parser.add_argument("--seconds", type=float, default=60.0, help="of each policy on each workload")
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plots", type=Path, help="folder for a plot of the adaptive server on each workload")
    arguments = parser.parse_args()
    if arguments.plots is not None:
        arguments.plots.mkdir(parents=True, exist_ok=True)
    trace = arguments.data / "traces" / "azure-llm-2023-conv.csv"
    arrivals = ["gamma:4", *([f"trace:{trace}:0.3"] if trace.exists() else [])]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / f"{default_checkpoint().name}-heavier"
        heavier(default_checkpoint(), checkpoint, mlp_factor=MLP_FACTOR, extra_depth=EXTRA_DEPTH)
        os.environ |= {
            "SCALA_CHECKPOINT": str(checkpoint),
            "SCALA_NUM_THREADS": str(arguments.threads),
            "SCALA_PROFILE_DIR": f"{folder}/profiles",
        }
        bench = Bench(
            arguments.data / "tiny-imagenet",
            checkpoint,
            seconds=arguments.seconds,
            threads=arguments.threads,
            seed=arguments.seed,
            plots=arguments.plots,
        )
        print(json.dumps(bench.measure(arrivals)))
    for sentence in bench.off_schedule:
        print(sentence, file=sys.stderr)
    sys.exit(1 if bench.off_schedule else 0)


@dataclass(frozen=True, slots=True)
class Capacity:
    """Answers a second, and the seconds of the event loop's thread that one took; 0 where nobody tells."""

    rate: float
    loop_s: float


class Bench:
    """The servers have all cores and requests leave at real-time priority; where that is not permitted, from the last
    core, which is then not the servers'. ``off_schedule``: what is wrong with runs."""

    def __init__(
        self, data: Path, checkpoint: Path, *, seconds: float, threads: int, seed: int, plots: Path | None
    ) -> None:
        self._data, self._checkpoint, self._seconds, self._seed = open_photos(data), checkpoint, seconds, seed
        cpus = sorted(available_cpus())
        with urgent() as permitted:
            self._cpus, self._sender = (cpus, cpus) if permitted else (cpus[:-1] or cpus, cpus[-1:])
        self._plots = plots
        self._core_is_shared = len(self._cpus) <= threads  # by the engine and the event loop
        self.off_schedule: list[str] = []

    def measure(self, arrivals: Sequence[str]) -> dict[str, Any]:
        widths = [Width(entry["width"]) for entry in _card(self._checkpoint)["widths"]]
        fixed = [f"fixed:{width}" for width in widths]
        with started_on(self._cpus) as server:
            narrowest, widest = (self._capacity(server(policy)) for policy in (fixed[0], fixed[-1]))
            rates = {str(widths[0]): narrowest.rate, str(widths[-1]): widest.rate}
            told = f"each takes {1000 * widest.loop_s:.2f} ms of the event loop's CPU"
            print(f"requests/s over HTTP, closed loop, by width: {rates}; {told}", flush=True)
            machine, loop_s = self._machine(), widest.loop_s if self._core_is_shared else 0.0
            workloads = {}
            for form in arrivals:
                workload = self._workload(form, OVER_WIDEST * widest.rate, self._seconds)
                workloads[workload.name] = self._compare(workload, fixed, server, machine, loop_s)
        report = {"checkpoint": self._checkpoint.name, "capacity": rates, "loop_ms": round(1000 * widest.loop_s, 3)}
        return report | {"workloads": workloads, "overload": self._overload(fixed[0])}

    def _compare(
        self, workload: Workload, fixed: Sequence[str], server: Servers, machine: Machine, loop_s: float
    ) -> dict[str, Any]:
        """The adaptive server, the two fixed widths that are best in simulation, the widest, and other policies."""
        others = ("slackfit", "threshold")
        expected = {name: simulated(machine, workload, name, loop_s) for name in ("adaptive", *fixed, *others)}
        best = sorted(fixed, key=lambda name: expected[name].expected_accuracy, reverse=True)[:2]
        names = ["adaptive", *dict.fromkeys([*best, fixed[-1]]), *others]
        played = self._play(workload, {name: server(name) for name in names})
        if self._plots is not None:
            place = self._plots / f"adaptive-{workload.name.split(':')[0]}.png"
            plot_run(place, joined(played["adaptive"].rounds), f"adaptive: {workload.name}")
        gained = gains({name: one.rounds for name, one in played.items()})
        rows = {
            name: row | {"simulated_attainment": expected[name].attainment, "ours_over": gained.get(name)}
            for name, row in self._rows(workload.name, played).items()
        }
        show(workload.name, rows)
        return rows

    def _overload(self, narrowest: str) -> dict[str, Any]:
        """Three times what the narrowest width can serve, the whole server on one core, the sender on another."""
        self._sender = self._sender[-1:]
        with started_on(self._cpus[:1]) as server:
            capacity = self._capacity(server(narrowest))
            workload = self._workload("poisson", OVER_NARROWEST * capacity.rate, OVERLOAD_S)
            played = self._play(workload, {"adaptive": server("adaptive")})
        rows = self._rows(f"{workload.name}, server on one core", played)
        show(f"{workload.name}, server on one core", rows)
        return rows["adaptive"] | {"capacity_of_the_narrowest": capacity.rate}

    def _play(self, workload: Workload, servers: Mapping[str, Running]) -> Mapping[str, Played]:
        photos = take(self._data, workload)
        bar = progress(True)
        bar.live.refresh_per_second = 1  # each drawing holds up what is due
        with bar, pinned(self._sender), urgent():
            task = bar.add_task("starting", total=len(workload) * len(servers))
            played: dict[str, list[Played]] = {name: [] for name in servers}
            before = 0
            for i, part in enumerate(parts_of(workload, PARTS)):
                order = [*servers] if i % 2 == 0 else [*servers][::-1]

                def tell(num_sent: int, text: str, before: int = before) -> None:
                    bar.update(task, completed=before + num_sent, description=text)

                turn = take_turns({name: servers[name] for name in order}, part, photos, num_rounds=1, progress=tell)
                for name, one in turn.items():
                    played[name].append(one)
                before += len(part) * len(servers)
        return {name: as_one(each) for name, each in played.items()}

    def _rows(self, title: str, played: Mapping[str, Played]) -> dict[str, dict[str, Any]]:
        summaries = {name: Summary.of(joined(one.rounds), one.counters) for name, one in played.items()}
        self.off_schedule += off_schedule({f"{title}: {name}": summary for name, summary in summaries.items()})
        return {name: summary.as_json() | server_side(played[name].counters) for name, summary in summaries.items()}

    def _capacity(self, server: Running) -> Capacity:
        """``CONCURRENCY`` callers, each asking again as soon as it is answered."""
        images = list(take(self._data, self._workload("poisson", 100.0, 1.0)).encoded.values())

        async def ask() -> list[Reply]:
            with closing(Client(server.port)) as client:
                budget = {"X-Latency-Budget-Ms": "5000"}
                return await closed_loop(client, images, budget, concurrency=CONCURRENCY, seconds=CAPACITY_S)

        before_s = event_loop_s(server.pid)
        with pinned(self._sender), urgent():
            num_answers = sum(reply.status == 200 for reply in run(ask()))
        return Capacity(round(num_answers / CAPACITY_S, 1), (event_loop_s(server.pid) - before_s) / max(1, num_answers))

    def _machine(self) -> Machine:
        """As the servers' own kept profile has it."""
        (kept,) = Path(os.environ["SCALA_PROFILE_DIR"]).glob("latency-*.json")
        return read_machine(kept, self._checkpoint)

    def _workload(self, arrivals: str, rate: float, seconds: float) -> Workload:
        count = len(self._data.labels)
        return make_workload(arrivals, BUDGETS, rate=rate, seconds=seconds, num_images=count, seed=self._seed)


def parts_of(workload: Workload, count: int) -> list[Workload]:
    """The same requests in pieces of equal length, each of which begins at 0."""
    name, length_s = workload.name, workload.seconds / count
    number = np.minimum(workload.arrivals_s // length_s, count - 1)
    return [
        Workload(name, workload.arrivals_s[inside] - i * length_s, workload.budgets_s[inside], workload.images[inside])
        for i in range(count)
        if (inside := number == i).any()
    ]


def as_one(parts: Sequence[Played]) -> Played:
    """What became of a workload that was played in parts."""
    counters = Counter[str]()
    for part in parts:
        counters.update(part.counters)
    return Played([joined([records for part in parts for records in part.rounds])], dict(counters))


@contextmanager
def started_on(cpus: Sequence[int]) -> Iterator[Servers]:
    """Servers on these cores, each started when it is first asked for and killed at the end."""
    with ExitStack() as stack:
        yield cache(lambda policy: stack.enter_context(serving(policy, cpus)))


def event_loop_s(pid: int) -> float:
    """CPU time of a server's main thread so far. Linux numbers it like the process; elsewhere 0 is told."""
    threads = psutil.Process(pid).threads() if psutil.LINUX else []
    return float(sum(thread.user_time + thread.system_time for thread in threads if thread.id == pid))


# -- the same in simulated time


def simulated(machine: Machine, workload: Workload, policy: str, loop_s: float) -> Result:
    scheduler = policies(machine, BUDGETS, Tuning())[OURS if policy == "adaptive" else policy]()
    device = SimulatedDevice(machine, beside_the_loop(workload.arrivals_s.tolist(), loop_s))
    return judge(simulate(workload, scheduler, device, machine.frontend), workload, machine)


def beside_the_loop(arrivals_s: Sequence[float], loop_s: float) -> Callable[[float], float]:
    """How many times as long a batch takes at an instant, on a core that engine and event loop share.

    The profile was measured while nobody asked. Each request takes ``loop_s`` of the core for HTTP, decoding and
    deciding, and the engine gets what is left: 1 less the loop's share in the 50 ms around the instant. ``arrivals_s``
    ascend.
    """

    def slowdown(now: float) -> float:
        first, last = bisect_left(arrivals_s, now - WINDOW_S / 2), bisect_right(arrivals_s, now + WINDOW_S / 2)
        return 1 / (1 - min(MOST_TAKEN, loop_s * (last - first) / WINDOW_S))

    return slowdown


# -- what the server's own metrics tell


def server_side(counters: Mapping[str, float]) -> dict[str, float | None]:
    """How long refusals for load took (p99), and how batches compare with what was predicted of them: the shares that
    took longer than the p99, and within 10 % of the median. None where there were none."""
    within, beyond = (counters.get(f'scala_batches_total{{within_p99="{word}"}}', 0.0) for word in ("true", "false"))
    predicted = buckets(counters, "scala_prediction_ratio")
    close = predicted.get(1.1, 0.0) - predicted.get(0.9, 0.0)
    return {
        "refusal_p99_server_ms": p99_ms(buckets(counters, "scala_stage_duration_seconds", 'stage="refusal"')),
        "p99_exceeded_share": beyond / (within + beyond) if within + beyond else None,
        "prediction_within_10_percent": close / predicted[math.inf] if predicted else None,
    }


def buckets(counters: Mapping[str, float], histogram: str, label: str = "") -> dict[float, float]:
    """How many values were at most so much, by how much, ascending; of all series of a histogram with this label."""
    found: defaultdict[float, float] = defaultdict(float)
    for name, count in counters.items():
        if name.startswith(f"{histogram}_bucket{{") and label in name and (bound := re.search(r'le="([^"]+)"', name)):
            found[float(bound[1])] += count
    return dict(sorted(found.items()))


def p99_ms(at_most_s: Mapping[float, float]) -> float | None:
    """The upper end of the bucket that the 99th percentile lies in. None of no value, or beyond the last bucket."""
    enough = (bound for bound, count in at_most_s.items() if count >= 0.99 * at_most_s[math.inf])
    bound_s = next(enough, math.inf)
    return 1000 * bound_s if bound_s < math.inf else None


# -- the tables


def _card(checkpoint: Path) -> Any:
    return json.loads((checkpoint / "config.json").read_bytes())


def show(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    shares = ("attainment", "attainment_admitted", "effective_accuracy", "mean_width", "wasted_engine_share")
    own = ("p99_exceeded_share", "prediction_within_10_percent", "refusal_p99_server_ms")
    table = Table("", *rows, title=title)
    for figure in (*shares, *own):
        table.add_row(figure, *("–" if row[figure] is None else f"{row[figure]:.4f}" for row in rows.values()))
    for figure in ("latency_p99_ms", "refusal_p99_ms", "lag_p99_ms"):
        table.add_row(figure, *("–" if row[figure] is None else f"{row[figure]['value']:.2f}" for row in rows.values()))
    table.add_row("statuses", *(str(row["statuses"]) for row in rows.values()))
    Console(file=sys.stdout, width=200).print(table)


if __name__ == "__main__":
    main()
