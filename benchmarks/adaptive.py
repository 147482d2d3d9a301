"""The adaptive server against fixed widths and other policies, live, on labelled images; and beside its simulation.

Every policy gets the same requests, from a generator on a core of its own. The network is the embedded checkpoint, made
heavier without changing its answers (``heavier.py``): as shipped, its widths cost less than their HTTP requests, and
which is run would hardly matter. Run: ``make bench-adaptive``. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.heavier import EXTRA_DEPTH, MLP_FACTOR, heavier
from scala_model.checkpoint import default_checkpoint
from server.bench.client import Client, closed_loop
from server.bench.compare import available_cpus, compare_policies, pinned, serving
from server.bench.photos import Photos, open_photos, take
from server.bench.play import Played, run
from server.bench.plot import plot_run
from server.bench.records import joined
from server.bench.summary import Summary, gains
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("SCALA_DATA_DIR", "../shared/data")))
    parser.add_argument("--seconds", type=float, default=60.0, help="of each policy on each workload")
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plots", type=Path, help="folder for a plot of the adaptive server on each workload")
    arguments = parser.parse_args()
    trace = arguments.data / "traces" / "azure-llm-2023-conv.csv"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / f"{default_checkpoint().name}-heavier"
        heavier(default_checkpoint(), checkpoint, mlp_factor=MLP_FACTOR, extra_depth=EXTRA_DEPTH)
        os.environ |= {
            "SCALA_CHECKPOINT": str(checkpoint),
            "SCALA_NUM_THREADS": str(arguments.threads),
            "SCALA_PROFILE_DIR": f"{folder}/profiles",
        }
        bench = Bench(arguments.data / "tiny-imagenet", checkpoint, arguments.seconds, arguments.seed, arguments.plots)
        arrivals = ["gamma:4", *([f"trace:{trace}:0.3"] if trace.exists() else [])]
        print(json.dumps(bench.measure(arrivals)))


class Bench:
    """The servers have all cores but the last, which sends the requests."""

    def __init__(self, data: Path, checkpoint: Path, seconds: float, seed: int, plots: Path | None) -> None:
        self._data, self._checkpoint, self._seconds, self._seed = open_photos(data), checkpoint, seconds, seed
        cpus = sorted(available_cpus())
        self._plots, self._cpus, self._sender = plots, cpus[:-1] or cpus, cpus[-1:]

    def measure(self, arrivals: Sequence[str]) -> dict[str, Any]:
        widths = [str(entry["width"]).removesuffix(".0") for entry in _card(self._checkpoint)["widths"]]
        capacity = {width: self._capacity(width) for width in (widths[0], widths[-1])}
        print("requests/s over HTTP, closed loop, by width:", capacity, flush=True)
        machine = self._machine()
        report: dict[str, Any] = {"checkpoint": self._checkpoint.name, "capacity": capacity, "workloads": {}}
        for form in arrivals:
            workload = self._workload(form, OVER_WIDEST * capacity[widths[-1]], self._seconds)
            simulated = {width: _simulated(machine, workload, f"fixed:{width}") for width in widths}
            best = sorted(widths, key=lambda width: simulated[width].expected_accuracy, reverse=True)
            fixed = list(dict.fromkeys([*best[:2], widths[-1]]))
            names = ["adaptive", *(f"fixed:{width}" for width in fixed), "slackfit", "threshold"]
            report["workloads"][workload.name] = self._compare(workload, names, machine)
        report["overload"] = self._overload(widths[0])
        return report

    def _compare(self, workload: Workload, names: Sequence[str], machine: Machine) -> dict[str, Any]:
        played = self._play(workload, names, self._cpus)
        if self._plots is not None:
            place = self._plots / f"adaptive-{workload.name.split(':')[0]}.png"
            plot_run(place, joined(played["adaptive"].rounds), f"adaptive: {workload.name}")
        gained = gains({name: one.rounds for name, one in played.items()})
        rows = {}
        for name, one in played.items():
            expected = _simulated(machine, workload, OURS if name == "adaptive" else name)
            rows[name] = _row(one) | {"simulated_attainment": expected.attainment, "ours_over": gained.get(name)}
        _show(workload.name, rows)
        return rows

    def _overload(self, narrowest: str) -> dict[str, Any]:
        """Three times what the narrowest width can serve, the whole server on one core."""
        cpus = self._cpus[:1]
        capacity = self._capacity(narrowest, cpus)
        workload = self._workload("poisson", OVER_NARROWEST * capacity, OVERLOAD_S)
        played = self._play(workload, ["adaptive"], cpus)
        row = _row(played["adaptive"]) | {"capacity_of_the_narrowest": capacity}
        _show(f"{workload.name}, server on one core", {"adaptive": row})
        return row

    def _play(self, workload: Workload, names: Sequence[str], cpus: Sequence[int]) -> Mapping[str, Played]:
        photos = take(self._data, workload)
        bar = progress(True)
        bar.live.refresh_per_second = 1  # each drawing holds up what is due
        with bar:
            task = bar.add_task("starting", total=len(workload) * len(names))
            return compare_policies(
                names,
                workload,
                photos,
                num_rounds=1,
                server_cpus=cpus,
                progress=lambda done, text: bar.update(task, completed=done, description=text),
            )

    def _capacity(self, width: str, cpus: Sequence[int] | None = None) -> float:
        """Answers a second at one width, ``CONCURRENCY`` callers asking again as soon as they are answered."""
        photos: Photos = take(self._data, self._workload("poisson", 100.0, 1.0))
        images = list(photos.encoded.values())
        with serving(f"fixed:{width}", cpus or self._cpus) as port, pinned(self._sender):
            client = Client(port)
            budget = {"X-Latency-Budget-Ms": "5000"}
            replies = run(closed_loop(client, images, budget, concurrency=CONCURRENCY, seconds=CAPACITY_S))
        return round(sum(reply.status == 200 for reply in replies) / CAPACITY_S, 1)

    def _machine(self) -> Machine:
        """As the servers' own kept profile has it."""
        (kept,) = Path(os.environ["SCALA_PROFILE_DIR"]).glob("latency-*.json")
        return read_machine(kept, self._checkpoint)

    def _workload(self, arrivals: str, rate: float, seconds: float) -> Workload:
        count = len(self._data.labels)
        return make_workload(arrivals, BUDGETS, rate=rate, seconds=seconds, num_images=count, seed=self._seed)


def _simulated(machine: Machine, workload: Workload, policy: str) -> Result:
    scheduler = policies(machine, BUDGETS, Tuning())[policy]()
    outcome = simulate(workload, scheduler, SimulatedDevice(machine), machine.frontend)
    return judge(outcome, workload, machine)


def _card(checkpoint: Path) -> Any:
    return json.loads((checkpoint / "config.json").read_bytes())


def _row(played: Played) -> dict[str, Any]:
    summary = Summary.of(joined(played.rounds), played.counters)
    counters = played.counters
    used = {use: counters.get(f'scala_engine_seconds_total{{use="{use}"}}', 0.0) for use in ("answered", "wasted")}
    within, beyond = (counters.get(f'scala_batches_total{{within_p99="{word}"}}', 0.0) for word in ("true", "false"))
    return asdict(summary) | {
        "wasted_device_share": used["wasted"] / max(1e-9, sum(used.values())),
        "p99_exceeded_share": beyond / max(1.0, within + beyond),
        "on_schedule": summary.on_schedule,
    }


def _show(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    figures = ("attainment", "attainment_admitted", "effective_accuracy", "mean_width", "wasted_device_share")
    table = Table("", *rows, title=title)
    for figure in figures:
        table.add_row(figure, *("–" if row[figure] is None else f"{row[figure]:.4f}" for row in rows.values()))
    for figure in ("latency_p99_ms", "refusal_p99_ms", "lag_p99_ms"):
        table.add_row(figure, *("–" if row[figure] is None else f"{row[figure]['value']:.2f}" for row in rows.values()))
    table.add_row("statuses", *(str(row["statuses"]) for row in rows.values()))
    Console(file=sys.stdout, width=160).print(table)


if __name__ == "__main__":
    main()
