"""The comparison of signals as a command: a table, a plot and a last line of JSON, of runs that are made up."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from server.simulation.scaling import KEDA, OUR_SIGNAL, RIVALS, steady
from server.simulation.study import Job


def told(job: Job) -> Any:
    """What a run would tell, with replica-hours by which seeds can be known again."""
    figures = {"replica_hours": 1.0, "debt": 0.5, "debt_of_the_served": 0.4, "attainment": 0.99, "most_ready": 4}
    steps = {"raised_s": 14.0, "raised_syncs": 1, "settled_s": None, "debt_settled": None}
    curves = {"curves": {"ready": [1.0, 2.0], "debt": [0.0, 1.0], "rate": [5.0, 5.0]}}
    if job.function is steady:
        return figures | {"demand": job.arguments[1]} | curves
    _, load, signal, seeds, goals = job.arguments
    assert goals is None or goals == tuple(1.0 + seed for seed in seeds), "our replica-hours, seed by seed"
    own = {"target": signal.target + 1 if goals else signal.target}
    rows = [figures | own | curves | (steps if load.step_s else {}) | {"replica_hours": 1.0 + seed} for seed in seeds]
    return rows


class Told:
    """A study whose runs take no time."""

    def __init__(self, folder: Path, num_processes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, jobs: Mapping[Any, Job], progress: Any) -> dict[Any, Any]:
        progress(len(jobs), len(jobs), "all")
        return {name: told(job) for name, job in jobs.items()}


@pytest.fixture
def report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[str, dict[str, Any]]:
    monkeypatch.setattr(scaling, "Study", Told)
    monkeypatch.setattr(sys, "argv", ["scaling", "--out", str(tmp_path), "--data", str(tmp_path)])
    scaling.main()
    shown = capsys.readouterr().out
    assert (tmp_path / "scaling-shipped.png").stat().st_size > 1000
    return shown, json.loads(shown.splitlines()[-1])


def test_the_last_line_is_json(report: tuple[str, dict[str, Any]]) -> None:
    _, line = report
    assert set(line["loads"]) == {"step", "ramp", "slow machines", "day", "bursts"}, "there is no recording"
    names = {OUR_SIGNAL.name, *(rival.name for rival in RIVALS)}
    assert {load for load, row in line["loads"].items() if set(row) == names | {KEDA.name}} == set(scaling.KEDA_ON)
    assert all(set(row) >= names for row in line["loads"].values())
    assert all(len(runs) == 3 for row in line["loads"].values() for runs in row.values())
    assert "curves" not in line["loads"]["step"][KEDA.name][0]
    assert [run["demand"] for run in line["steady"]] == list(scaling.DEMANDS)


def test_targets_of_the_day_are_those_of_loads_that_are_not_tuned(report: tuple[str, dict[str, Any]]) -> None:
    _, line = report
    for rival in RIVALS:
        assert line["loads"]["day"][rival.name][0]["target"] == rival.target + 1
        assert line["loads"]["step"][rival.name][0]["target"] == rival.target + 1
    assert line["loads"]["step"][OUR_SIGNAL.name][0]["target"] == OUR_SIGNAL.target


def test_the_table_tells_what_never_happened(report: tuple[str, dict[str, Any]]) -> None:
    shown, _ = report
    assert "never, never, never" in shown
    assert "14, 14, 14" in shown


def test_a_load_to_tune_on_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling", "--out", str(tmp_path), "--loads", "step"])
    with pytest.raises(SystemExit):
        scaling.main()
