"""Both control loops in simulated time: widths within each replica, and the number of replicas, by several signals.

Kubernetes' autoscaler, scrapes every 15 s, replicas that take 20 s to be ready, a balancer that picks at random. On
the day, the bursts and the recorded trace each rival's target is tuned to our replica-hours, seed by seed; on the
other loads it has the mean of the targets that the day needed. Needs no device, and no idle machine: nothing is
measured. Run: ``make simulate-scaling``. The last line is JSON. Results are kept in a folder, so that a run that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is there; its threads would be in the processes' way

from rich.console import Console
from rich.table import Table

from scala_model.checkpoint import default_checkpoint
from server.cgroup import available_cpus
from server.console import progress
from server.simulation.device import Machine
from server.simulation.experiment import paired
from server.simulation.machines import built_in, with_checkpoint
from server.simulation.replicas import Signal
from server.simulation.scaling import (
    EVERY_S,
    KEDA,
    OUR_SIGNAL,
    RIVALS,
    Load,
    compared,
    full_width_rate,
    heavier,
    loads,
    steady,
)
from server.simulation.study import OUR_SERVER, SIMULATED, Job, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SOURCES = (*SIMULATED, *OUR_SERVER, *(f"server/simulation/{name}.py" for name in ("autoscaler", "replicas", "scaling")))
DEMANDS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0, 1.5, 2.25)
EQUAL_HOURS = ("day", "bursts", "trace")  # the first of them that is played lends its targets to the other loads
KEDA_ON = ("step", "bursts")  # it differs only in how pods without a sample count
RECORDING = "traces/azure-llm-2023-conv.csv"
Runs = list[dict[str, Any]]  # of a signal on a load, one a seed
Found = dict[str, dict[str, Runs]]  # by load and signal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("SCALA_DATA_DIR", "../shared/data")))
    parser.add_argument("--accuracies", choices=("shipped", "published"), default="shipped")
    parser.add_argument("--loads", nargs="*", metavar="NAME", help="only these; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="3 or more")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="folder for results and the plot")
    parser.add_argument("--jobs", type=int, default=max(1, int(available_cpus())), help="processes")
    arguments = parser.parse_args()
    recording: Path | None = (arguments.data / RECORDING).resolve()
    if recording is not None and not recording.is_file():
        print(f"There is no {recording}: the load that plays it is left out (set SCALA_DATA_DIR).", file=sys.stderr)
        recording = None
    machine = built_in("cpu")
    if arguments.accuracies == "shipped":
        machine = with_checkpoint(machine, default_checkpoint())
    machine = heavier(machine)
    played = [one for one in loads(recording) if one.name in (arguments.loads or [one.name])]
    if not any(load.name in EQUAL_HOURS for load in played):
        parser.error(f"name one of {', '.join(EQUAL_HOURS)} among the loads: targets are tuned on it")
    study = Study(arguments.out, arguments.jobs)
    campaign = Campaign(study, machine, tuple(range(arguments.seeds)))
    alone, found = campaign.alone(), campaign.compare(played)
    show(machine, played, alone, found)
    draw(arguments.out / f"scaling-{arguments.accuracies}.png", played, found)
    print(
        json.dumps(
            {"about": machine.about, "replica_per_s": full_width_rate(machine), "steady": bare(alone)}
            | {"loads": {load: {signal: bare(runs) for signal, runs in row.items()} for load, row in found.items()}}
        )
    )


class Campaign:
    def __init__(self, study: Study, machine: Machine, seeds: tuple[int, ...]) -> None:
        self._study, self._machine, self._seeds = study, machine, seeds

    def alone(self) -> Runs:
        """One replica, under one steady demand after the other."""
        jobs = {
            demand: Job(f"steady {demand:g}", steady, (self._machine, demand, self._seeds[0]), SOURCES)
            for demand in DEMANDS
        }
        return list(self._run(jobs, "steady").values())

    def compare(self, played: Sequence[Load]) -> Found:
        tuned_on = [load for load in played if load.name in EQUAL_HOURS]
        mine: list[tuple[Load, Signal, None]] = [(load, OUR_SIGNAL, None) for load in played]
        ours = self._play([*mine, *((load, KEDA, None) for load in played if load.name in KEDA_ON)], "ours")
        goals = {load.name: tuple(run["replica_hours"] for run in ours[load.name][OUR_SIGNAL.name]) for load in played}
        rivals = self._play([(load, signal, goals[load.name]) for signal in RIVALS for load in tuned_on], "tuning")
        targets = {name: fmean(run["target"] for run in runs) for name, runs in rivals[tuned_on[0].name].items()}
        others = self._play(
            [
                (load, replace(signal, target=targets[signal.name]), None)
                for load in played
                if load not in tuned_on
                for signal in RIVALS
            ],
            "others",
        )
        return {load.name: ours[load.name] | (rivals | others)[load.name] for load in played}

    def _play(self, wanted: Sequence[tuple[Load, Signal, tuple[float, ...] | None]], what: str) -> Found:
        jobs = {
            (load.name, signal.name): Job(
                f"{load.name}, {signal.name}", compared, (self._machine, load, signal, self._seeds, goals), SOURCES
            )
            for load, signal, goals in wanted
        }
        found: Found = {}
        for (load_name, signal_name), runs in self._run(jobs, what).items():
            found.setdefault(load_name, {})[signal_name] = runs
        return found

    def _run(self, jobs: Mapping[Any, Job], what: str) -> dict[Any, Any]:
        with progress(True) as bar:
            task = bar.add_task(what, total=None)

            def tell(done: int, total: int, last: str) -> None:
                bar.update(task, completed=done, total=total, description=f"{what}: {last}")

            return self._study.run(jobs, tell)


# -- what is shown


def bare(runs: Runs) -> list[dict[str, Any]]:
    """Without curves."""
    return [
        {
            name: round(value, 5) if isinstance(value, float) else value
            for name, value in run.items()
            if name != "curves"
        }
        for run in runs
    ]


def mean(runs: Runs, figure: str) -> float:
    return fmean(run[figure] for run in runs)


def show(machine: Machine, played: Sequence[Load], alone: Runs, found: Found) -> None:
    console = Console(width=200)
    console.print(machine.about)
    table = Table("full-width demand of one replica", "points lost", "in time, %", title="one replica alone")
    for run in alone:
        table.add_row(f"{run['demand']:g}", f"{run['debt']:.3f}", f"{100 * run['attainment']:.2f}")
    console.print(table)
    for load in played:
        console.print(load_table(load, found[load.name]))


def load_table(load: Load, row: Mapping[str, Runs]) -> Table:
    steps = ["raised after, s", "settled after, s", "points lost then"] if load.step_s is not None else []
    heading = ["", "target", "replica-hours", "points lost", "more than ours", "in time, %", "most replicas", *steps]
    table = Table(*heading, title=f"{load.name}: means of the seeds; differences with 95 % intervals")
    ours = row[OUR_SIGNAL.name]
    for name, runs in row.items():
        more = paired([run["debt"] for run in runs], [run["debt"] for run in ours])
        cells = [
            f"{mean(runs, 'target'):.3g}",
            f"{mean(runs, 'replica_hours'):.4f}",
            f"{mean(runs, 'debt'):.3f}",
            "" if runs is ours else f"{more.mean:+.3f} ± {more.high - more.mean:.3f}",
            f"{100 * mean(runs, 'attainment'):.3f}",
            f"{mean(runs, 'most_ready'):.1f}",
        ]
        if load.step_s is not None:
            cells += [each(runs, "raised_s"), each(runs, "settled_s"), each(runs, "debt_settled", ".3f")]
        table.add_row(name, *cells)
    return table


def each(runs: Runs, figure: str, form: str = ".0f") -> str:
    return ", ".join("never" if run[figure] is None else format(run[figure], form) for run in runs)


def draw(path: Path, played: Sequence[Load], found: Found) -> None:
    """Ready replicas and accuracy lost over time, of the first seed: a line a signal, a row a load."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.9 * len(played) + 0.6), dpi=80, layout="constrained")
    grid = figure.subplots(len(played), 2, squeeze=False)
    for load, (replicas, debt) in zip(played, grid, strict=True):
        for signal, runs in found[load.name].items():
            if signal != KEDA.name:
                draw_line(replicas, signal, runs[0]["curves"]["ready"])
                draw_line(debt, signal, runs[0]["curves"]["debt"])
        replicas.set_title(f"{load.name}: ready replicas", fontsize="small", loc="left")
        debt.set_title(f"{load.name}: points of accuracy lost", fontsize="small", loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("seconds")
    grid[0, 0].legend(frameon=False, fontsize="x-small")
    figure.savefig(path, format="png", backend="agg", metadata={"Software": None})
    print(f"Wrote {path}", file=sys.stderr)


def draw_line(axes: Axes, signal: str, values: Sequence[float]) -> None:
    ours = signal == OUR_SIGNAL.name
    at_s = [EVERY_S * (i + 0.5) for i in range(len(values))]
    axes.plot(at_s, values, label=signal, linewidth=1.8 if ours else 1.0, zorder=3 if ours else 2)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
