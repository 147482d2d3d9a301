"""The benchmark of a replica's start: its arithmetic and what it refuses."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import cold_start
from benchmarks.cold_start import CASES, Case, Measured


def measured(busy: list[float]) -> Measured:
    return Measured({case.name: busy if case.busy else [1.0, 2.0, 1.0] for case in CASES})


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    told = json.loads(json.dumps(measured([3.0, 2.0, 1.5]).as_json()))  # ratios of 3, 1 and 1.5
    assert (told["alone_s"], told["busy_s"], told["ratio"], told["ratio_cached"]) == (1.0, 2.0, 1.5, 1.5)
    assert told["goals_met"]


@pytest.mark.parametrize("busy", [[3.0, 3.0, 3.0], [6.0, 2.0, 6.0]])
def test_a_slow_start_misses_the_goals(busy: list[float]) -> None:
    assert not measured(busy).as_json()["goals_met"]


def test_the_four_cases_are_told_apart() -> None:
    assert len({case.name for case in CASES}) == 4
    assert Case(busy=True, remembers=True).name == "busy_cached"


def test_no_runs_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["cold_start", "--runs", "0"])
    with pytest.raises(SystemExit):
        cold_start.main()
    assert "--runs" in capsys.readouterr().err
