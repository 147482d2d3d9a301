"""``scala-serve simulate``: what the user asks for, and what is shown. Heavy imports wait until it is called."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.flags import JsonFlag

if TYPE_CHECKING:
    from server.simulation.campaign import Comparison
    from server.simulation.device import Machine
    from server.simulation.study import Study

RECORDING = "traces/azure-llm-2023-conv.csv"


def simulate(
    profile: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="cpu, gpu, or a FILE.json of measured latencies; repeat for more. Default: cpu and gpu.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Which images each width gets right. Default: drawn for cpu and gpu, else the package's own.",
        ),
    ] = None,
    policies: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Names or patterns, F-*,SF-b; ours is always there.")
    ] = None,
    workloads: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Names or patterns, such as poisson*,trace*.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=3, help="Runs of each policy on each workload.")] = 10,
    full: Annotated[bool, typer.Option("--full", help="All policies and workloads, and longer: hours.")] = False,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Keeps results, so that they are not run again, and plots.")
    ] = Path("runs/simulate"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one a core.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"Recorded arrivals, CSV with a column TIMESTAMP. Default: {RECORDING} in SCALA_DATA_DIR.",
        ),
    ] = None,
    only_json: JsonFlag = False,
) -> None:
    """Compare the policy with others in simulated time: no server, no device.

    Prints a table for each profile and, as the last line, one JSON object. Results are kept, so that a run that was
    stopped goes on.

        scala-serve simulate --profile cpu
        scala-serve simulate --profile latency.json --policies F-* --workloads poisson*

    The first compares on the measured profile that comes with the package, the second on one of your own, which
    `scala-serve profile --json > latency.json` writes.

    Exit codes: 0 compared; 2 wrong usage or input.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("the plots need matplotlib: pip install 'scala-serve[train]'")
    # A process runs one simulation at a time; threads of its matrix products would only be in the others' way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from server.cgroup import available_cpus
    from server.simulation.report import as_json, draw
    from server.simulation.study import Study

    machines = [_machine(name, checkpoint) for name in profile or ("cpu", "gpu")]
    _check_names([machine.name for machine in machines])
    recording = _recording(trace)
    study = Study(out, jobs or max(1, int(available_cpus())))
    line: dict[str, Any] = {}
    for machine in machines:
        comparisons = _compare(study, machine, policies, workloads, recording, seeds, full=full)
        if not only_json:
            _print_table(machine, comparisons)
        for path in draw(out, comparisons):
            print(f"Wrote {path}", file=sys.stderr)
        line[machine.name] = as_json(comparisons)
    print(json.dumps(line))


def _print_table(machine: Machine, comparisons: list[Comparison]) -> None:
    from rich.console import Console
    from rich.table import Table

    from server.simulation.report import summary, table

    heading, *rows = table(comparisons)
    shown = Table(*heading, title=f"{machine.name}: effective accuracy in %, ours against others in points (± 95 %)")
    for row in rows:
        shown.add_row(*row)
    Console(width=200).print(shown)
    print(machine.about)
    for sentence in summary(comparisons):
        print(sentence)


def _machine(name: str, checkpoint: Path | None) -> Machine:
    from scala_model.checkpoint import default_checkpoint
    from server.simulation.machines import built_in, read_machine, with_checkpoint

    if name.endswith(".json"):
        return read_machine(Path(name), checkpoint or default_checkpoint())
    machine = built_in(name)
    return machine if checkpoint is None else with_checkpoint(machine, checkpoint)


def _check_names(names: list[str]) -> None:
    """Tables, plots and the line of JSON tell profiles apart by their names."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two profiles are called {name!r}: leave one out, or rename its file")


def _recording(trace: Path | None) -> Path | None:
    """None, and a sentence, where the default is not there. Raises ValueError where the user's own is not."""
    path = trace or Path(os.environ.get("SCALA_DATA_DIR", "../shared/data"), RECORDING)
    if path.is_file():
        return path.resolve()
    if trace is not None:
        raise ValueError(f"there is no recording {trace}: give a CSV file with a column TIMESTAMP")
    print(f"There is no {path}: workloads that play it are left out (set SCALA_DATA_DIR, or --trace).", file=sys.stderr)
    return None


def _compare(
    study: Study,
    machine: Machine,
    policies: str | None,
    workloads: str | None,
    recording: Path | None,
    seeds: int,
    *,
    full: bool,
) -> list[Comparison]:
    from server.console import progress
    from server.simulation import campaign
    from server.simulation.baselines import Tuning
    from server.simulation.experiment import OURS
    from server.simulation.experiment import policies as all_policies
    from server.simulation.scenarios import SELECTION, USUAL, scenarios

    names = all_policies(machine, USUAL, Tuning())
    usual_policies = "*" if full else campaign.FEW
    picked = campaign.chosen(names, f"{OURS},{policies}" if policies else usual_policies, "policy")
    available = {one.label: one for one in scenarios(machine, recording, full=full)}
    usual_workloads = ",".join(available if full else available.keys() & SELECTION)
    played = [available[label] for label in campaign.chosen(available, workloads or usual_workloads, "workload")]
    with progress(True) as bar:
        task = bar.add_task(machine.name, total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        tuned = campaign.tune(study, machine, picked, full=full, progress=show)
        return campaign.compare(study, machine, played, tuned, seeds, progress=show)
