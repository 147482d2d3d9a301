"""Comparisons: who is tuned on what, who is best, and what people and programs are told of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.simulation import campaign, scenarios
from server.simulation.baselines import Tuning
from server.simulation.campaign import Comparison, chosen, compare, tune
from server.simulation.command import simulate
from server.simulation.experiment import Result
from server.simulation.report import as_json, draw, summary, table
from server.simulation.scenarios import Scenario
from server.simulation.study import Study
from tests.unit.simulated_machine import make_machine

NOTHING = Result(100, 0.9, 0.95, 0.0, 0.0, 0.5, 10.0, 20.0, 5, 5, 0, 0.01, 1.5, 0.25)
POISSON = Scenario("poisson", "stationary", "poisson", 0.5, 4.0)
ON_OFF = Scenario("on/off", "changing", "on-off:0.4-3:1:1", 1.0, 4.0)


def compared(scenario: Scenario, bound: float, **accuracies: Sequence[float]) -> Comparison:
    """Underscores stand for what a name of a policy has instead."""
    results = {
        name.replace("_", "-"): [replace(NOTHING, expected_accuracy=a, effective_accuracy=a + 0.01) for a in values]
        for name, values in accuracies.items()
    }
    return Comparison(make_machine(), scenario, results, [bound] * 3)


# ours 0.70, the best fixed width 0.68, SlackFit's better form 0.65
ONE = compared(POISSON, 0.72, ours=(0.69, 0.70, 0.71), F_1=(0.6, 0.6, 0.6), AS_1=(0.67, 0.68, 0.69), SF_a=(0.65,) * 3)
# 0.60, 0.61 and 0.50
TWO = compared(ON_OFF, 0.66, ours=(0.59, 0.60, 0.61), F_1=(0.61,) * 3, AS_1=(0.5,) * 3, SF_a=(0.5,) * 3)


def silent(done: int, total: int, what: str) -> None:
    pass


# -- what is compared


def test_policies_are_named_by_patterns() -> None:
    names = ["ours", "F-0.5", "F-1", "SF-a", "F-1+EDF"]
    assert chosen(names, "F-*[0-9]", "policy") == ["F-0.5", "F-1"]
    assert chosen(names, "SF-a, F-?,ours", "policy") == ["ours", "F-1", "SF-a"]
    with pytest.raises(ValueError, match=r"no policy is called 'G-\*'; there are ours, F-0\.5"):
        chosen(names, "ours,G-*", "policy")


def test_parameters_are_chosen_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image takes 40 ticks and its budget is 45: who waits for others, 51 ticks or more, is late."""
    calm = [Scenario("training", "stationary", "poisson", 0.02, 60.0, f"{45_000 / 1024}")]
    monkeypatch.setattr(campaign, "training", lambda machine, full: calm)
    monkeypatch.setattr(campaign, "ladder", lambda machine, full: calm)
    tuned = tune(Study(tmp_path, 1), make_machine(), ["ours", "TR-1", "MS"], full=False, progress=silent)
    assert tuned["TR-1"].delay_s == 0.001
    assert tuned["MS"].switching == ((0.02 * 64, 2),)  # so few that the widest is best
    assert tuned["ours"].switching == ()


def test_every_policy_is_run_with_every_seed(tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    tuned = dict.fromkeys(("ours", "F-1", "ours-static"), Tuning())
    study = Study(tmp_path, 1)
    (one,) = compare(study, make_machine(), [POISSON], tuned, 3, lambda *told: done.append(told[:2]))
    assert done[-1] == (9, 9)  # three seeds of two policies and the bound
    assert {name: len(results) for name, results in one.results.items()} == {"ours": 3, "F-1": 3}
    assert len({result.arrivals for result in one.results["ours"]}) > 1
    assert [r.arrivals for r in one.results["ours"]] == [r.arrivals for r in one.results["F-1"]]
    assert one.bound >= one.mean("ours")


def test_the_best_is_chosen_in_hindsight() -> None:
    assert ONE.best("F-", "AS-") == "AS-1"
    assert TWO.best("F-", "AS-") == "F-1"
    assert ONE.best("TH") is None
    ahead = ONE.ahead_of("AS-1")
    assert (ahead.mean, ahead.low, ahead.high) == pytest.approx((0.02, 0.02, 0.02))  # in each of the three runs


# -- what is told


def test_the_table_has_a_line_for_each_scenario() -> None:
    heading, first, second = table([ONE, TWO])
    assert heading == [
        "workload", "ours", "best fixed", "SlackFit", "bound", "vs fixed", "vs SlackFit", "in time", "admitted",
        "widest",
    ]  # fmt: skip
    assert first[:5] == ["poisson 0.5x", "70.00", "68.00 AS-1", "65.00 SF-a", "72.00"]
    assert first[5] == "+2.00 ± 0.00"
    assert second[5].startswith("-1.00 ± 2.4")  # standard deviation 1 point, three runs: 4.303 / 3 ** 0.5
    assert second[7:] == ["90.00", "95.00", "25.00"]


def test_sentences_tell_the_least() -> None:
    sentences = "\n".join(summary([ONE, TWO]))
    assert "Ahead of best fixed (stationary): +2.00 points on average, +2.00 at least (poisson 0.5x)." in sentences
    assert "Ahead of best fixed (changing): -1.00 points on average, -1.00 at least (on/off 1x)." in sentences
    assert "Ahead of SlackFit (all): +7.50 points on average, +5.00 at least (poisson 0.5x)." in sentences
    assert "up to 1x: at least 97.22 %." in sentences  # 0.70 / 0.72
    assert "differ by 1.00 points at most" in sentences
    assert len(summary([TWO])) == 3


def test_the_json_holds_the_same() -> None:
    told = json.loads(json.dumps(as_json([ONE, TWO])))
    assert told["capacity"] == 64
    one = told["workloads"][0]
    assert (one["name"], one["load"], one["bound"]) == ("poisson", 0.5, 0.72)
    assert one["best"] == {"best fixed": "AS-1", "SlackFit": "SF-a"}
    assert one["ahead"]["SlackFit"][0] == pytest.approx(0.05)
    assert one["policies"].keys() == {"ours", "AS-1", "SF-a"}
    assert one["policies"]["ours"]["expected_accuracy"] == 0.7
    assert one["policies"]["ours"]["wasted"] == 0.01


def test_plots_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert [path.name for path in draw(tmp_path, [ONE, TWO])] == ["toy-ahead.png"]
    more = replace(ONE, scenario=replace(POISSON, load=1.0))
    paths = draw(tmp_path, [ONE, more, TWO])
    assert {path.name for path in paths} == {"toy-ahead.png", "toy-accuracy.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


# -- the command


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A small question, a small profile, and little traffic."""
    pytest.importorskip("matplotlib")
    cells = [{"width": w, "batch": 1, "p50_ms": 10.0 * w, "p99_ms": 12.0 * w} for w in (0.25, 0.5, 0.75, 1)]
    (tmp_path / "mine.json").write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(scenarios, "_seconds", lambda machine, full: 2.0)
    return {
        "profile": [str(tmp_path / "mine.json")],
        "policies": "F-1",
        "workloads": "poisson 0.5x",
        "seeds": 3,
        "out": tmp_path / "out",
        "jobs": 1,
    }


def test_the_command_ends_with_a_line_of_json_and_runs_nothing_twice(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(**asked)
    shown = capsys.readouterr()
    told = json.loads(shown.out.splitlines()[-1])
    assert told["mine"]["workloads"][0]["best"] == {"best fixed": "F-1"}
    assert "poisson 0.5x" in shown.out
    assert "Latencies: mine.json." in shown.out
    kept = (asked["out"] / "results.jsonl").read_text()
    simulate(**asked)
    assert (asked["out"] / "results.jsonl").read_text() == kept
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == told


def test_without_a_recording_its_workloads_are_left_out_with_a_sentence(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCALA_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"no workload is called 'trace\*'; there are poisson 0\.5x"):
        simulate(**asked | {"workloads": "trace*"})
    assert "workloads that play it are left out (set SCALA_DATA_DIR, or --trace)" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"there is no recording nowhere\.csv: give a CSV file"):
        simulate(**asked | {"trace": Path("nowhere.csv")})


def test_what_is_unknown_is_refused_before_anything_runs(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="profile 'tpu' does not exist"):
        simulate(**asked | {"profile": ["tpu"]})
    (namesake := asked["out"].parent / "other" / "mine.json").parent.mkdir()
    namesake.write_bytes(Path(asked["profile"][0]).read_bytes())
    with pytest.raises(ValueError, match="two profiles are called 'mine': leave one out, or rename its file"):
        simulate(**asked | {"profile": [*asked["profile"], str(namesake)]})
    with pytest.raises(ValueError, match="no policy is called 'best'"):
        simulate(**asked | {"policies": "best"})
