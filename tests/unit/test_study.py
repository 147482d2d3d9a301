"""Jobs are run once, whatever happens in between."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.simulation import study
from server.simulation.scenarios import Scenario
from server.simulation.study import Job, Study
from tests.unit.simulated_machine import CORRECT, make_machine
from tests.unit.test_imports import MODULES, reached_from


def silent(done: int, total: int, what: str) -> None:
    pass


class Counting:
    """Adds up its numbers, and how often it was asked."""

    __name__ = "counting"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *numbers: Any) -> float:
        self.calls += 1
        return float(sum(n for n in numbers if isinstance(n, int)))


def jobs_of(function: Callable[..., Any], *numbers: int) -> dict[int, Job]:
    return {n: Job(f"job {n}", function, (n, 1)) for n in numbers}


def test_results_come_in_the_order_of_the_jobs_and_are_kept(tmp_path: Path) -> None:
    add, told = Counting(), []
    found = Study(tmp_path, 1).run(jobs_of(add, 3, 1, 2), lambda *what: told.append(what))
    assert list(found.items()) == [(3, 4.0), (1, 2.0), (2, 3.0)]
    assert told == [(0, 3, ""), (1, 3, "job 3"), (2, 3, "job 1"), (3, 3, "job 2")]

    told.clear()
    assert Study(tmp_path, 1).run(jobs_of(add, 1, 4, 3), lambda *what: told.append(what)) == {1: 2.0, 4: 5.0, 3: 4.0}
    assert add.calls == 4
    assert told == [(2, 3, ""), (3, 3, "job 4")]


def test_what_a_stop_cut_off_is_run_again(tmp_path: Path) -> None:
    add = Counting()
    Study(tmp_path, 1).run(jobs_of(add, 1, 2), silent)
    kept = tmp_path / "results.jsonl"
    kept.write_text(kept.read_text()[:-9])
    assert Study(tmp_path, 1).run(jobs_of(add, 1, 2), silent) == {1: 2.0, 2: 3.0}
    assert add.calls == 3
    assert Study(tmp_path, 1).run(jobs_of(add, 1, 2), silent) == {1: 2.0, 2: 3.0}  # and kept on a line of its own
    assert add.calls == 3


def test_a_job_that_fails_ends_the_study_and_leaves_what_was_done(tmp_path: Path) -> None:
    bad = {"good": Job("good", math.sqrt, (4.0,)), "bad": Job("bad", math.sqrt, (-1.0,))}
    with pytest.raises(ValueError, match=r"domain|nonnegative"):
        Study(tmp_path, 1).run(bad, silent)
    assert '"label": "good", "result": 2.0' in (tmp_path / "results.jsonl").read_text()


def test_a_job_is_another_when_an_input_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add, machine = Counting(), make_machine()
    runs = Study(tmp_path, 1)

    def calls_for(job: Job) -> int:
        before = add.calls
        runs.run({"it": job}, silent)
        return add.calls - before

    job = Job("job", add, (machine, 1))
    assert calls_for(job) == 1
    assert calls_for(replace(job, label="said otherwise")) == 0
    assert calls_for(replace(job, arguments=(make_machine(), 1))) == 0
    assert calls_for(replace(job, arguments=(machine, 2))) == 1
    assert calls_for(replace(job, arguments=(replace(machine, correct=~CORRECT), 1))) == 1
    (tmp_path / "server/simulation").mkdir(parents=True)
    (tmp_path / "server/simulation/simulator.py").write_text("time = 1")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    assert calls_for(job) == 1
    assert calls_for(job) == 0
    (tmp_path / "server/simulation/simulator.py").write_text("time = 2")
    assert calls_for(job) == 1


def test_a_recording_is_known_by_what_it_says(tmp_path: Path) -> None:
    add, runs = Counting(), Study(tmp_path, 1)
    first, moved = tmp_path / "a.csv", tmp_path / "b.csv"

    def calls_for(recording: Path, *, in_ladder: bool = False) -> int:
        before = add.calls
        scenario = Scenario("trace", "changing", f"trace:{recording}", 1.0, 5.0)
        runs.run({"it": Job("job", add, ((scenario,) if in_ladder else scenario, 1))}, silent)
        return add.calls - before

    first.write_text("TIMESTAMP\n1\n2\n")
    moved.write_text("TIMESTAMP\n1\n2\n")
    assert (calls_for(first), calls_for(first, in_ladder=True)) == (1, 1)
    assert (calls_for(moved), calls_for(moved, in_ladder=True)) == (0, 0)
    first.write_text("TIMESTAMP\n1\n3\n")
    assert (calls_for(first), calls_for(first, in_ladder=True)) == (1, 1)


def test_what_decides_a_result_exists() -> None:
    for pattern in study.SIMULATED + study.OUR_SERVER:
        assert list(study.ROOT.glob(pattern)), pattern


def test_all_that_a_simulation_loads_decides_its_result() -> None:
    """But the packages' own files, which compute nothing, and what one of them loads for readers of checkpoints."""
    counted = {file for pattern in study.SIMULATED + study.OUR_SERVER for file in study.ROOT.glob(pattern)}
    loaded = reached_from("server.simulation.experiment", at_import=True) & MODULES.keys()
    others = {"scala_model", "scala_model.config", "server", "server.simulation"}
    assert {name for name in loaded if MODULES[name] not in counted} == others


def test_processes_give_the_same(tmp_path: Path) -> None:
    found = Study(tmp_path, 2).run({n: Job("job", math.factorial, (n,)) for n in (5, 3, 4)}, silent)
    assert found == {5: 120, 3: 6, 4: 24}
