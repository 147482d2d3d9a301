"""Replay: recorded decisions are derived again, bit for bit; what differs, is missing or is damaged is told."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from scala_model.checkpoint import read_checkpoint
from server.decision_log import DecisionLog
from server.planner import PlanInputs
from server.policies import policy_of
from server.replay import Player, Report
from server.replay import replay as derive
from server.replay_command import replay
from server.replay_log import DecisionReader, log_files
from server.types import Load, QueueView
from tests.unit.decision_lines import (
    CELLS,
    HEADER,
    LOAD,
    NARROW,
    WIDE,
    decided,
    make_profile,
    plan_inputs,
    write_log,
)
from tests.unit.edge.application import Runner, Site
from tests.unit.toy import write_toy

HALF_A_LINE = '{"decision": {"now": 1.0, "lo'
# By hand, for SlackFit of 16 buckets: with 100 ms to go one image runs at the widest, 40 ms; with 20 ms at the
# narrowest, 10 ms; two with 100 ms in one batch at the widest, 48 ms.
ONE_WITH_TIME = decided([0.1], 1.0, [0], 0.04)
ONE_IN_HASTE = decided([0.02], 0.25, [0], 0.01)
TWO = decided([0.1, 0.1], 1.0, [0, 1], 0.048)


def derived(path: Path, other: str | None = None) -> Report:
    return derive(DecisionReader(log_files(path)), other)


@pytest.fixture
def run() -> Any:
    """The command by itself: exit code and output."""
    app = typer.Typer()
    app.command()(replay)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(path: Path, other: str | None = None) -> str:
    with pytest.raises(ValueError, match=r".") as raised:
        derived(path, other)
    return str(raised.value)


# -- what is derived again


def test_decisions_worked_out_by_hand_are_derived_again(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", ONE_WITH_TIME, ONE_IN_HASTE, TWO)
    report = derived(log)
    assert (report.decisions, report.identical, report.different, report.first_difference) == (3, 3, 0, None)


@pytest.mark.parametrize(
    "change",
    [{"width": 0.25}, {"batch": []}, {"shed": [0]}, {"predicted_s": 0.04000000000000001}, {"reason": "luck"}],
)
def test_the_least_difference_is_one(tmp_path: Path, change: dict[str, Any]) -> None:
    other = {"decision": ONE_WITH_TIME["decision"] | change}
    log = write_log(tmp_path / "log.jsonl", ONE_WITH_TIME, other, other)
    report = derived(log)
    assert (report.decisions, report.identical, report.different) == (3, 1, 2)
    assert report.first_difference is not None
    moment, again = report.first_difference
    assert (moment.path, moment.line) == (log, 5)
    assert (again.width, again.predicted_s) == (WIDE, 0.04)


def test_the_profile_is_what_the_last_lines_say(tmp_path: Path) -> None:
    log = write_log(
        tmp_path / "log.jsonl",
        ONE_WITH_TIME,
        {"cells": [[1.0, 1, 1 / 24, 1 / 22]]},
        decided([0.1], 1.0, [0], 1 / 22),
        {"profile": CELLS[:1]},
        decided([0.1], 0.25, [0], 0.01),
    )
    assert derived(log).different == 0
    profile = next(iter(DecisionReader([write_log(log, {"cells": [[1.0, 2, 0.1 + 0.2, 1 / 3]]}, TWO)]))).profile
    assert profile.rows(WIDE) == ((1, 0.04, 0.04), (2, 0.30000000000000004, 0.3333333333333333))
    assert profile.rows(NARROW) == ((1, 0.01, 0.01), (2, 0.012, 0.012))


def test_pins_load_and_instants_are_those_of_the_record(tmp_path: Path) -> None:
    told = decided(
        [100.02, 100.1],
        0.25,
        [1],
        1.1 * 0.01,
        now=100.0,
        load=LOAD | {"interference": 1.1, "hop_s": 0.001},
        kinds=[[1.0], [0.25]],
        kind_of=[0, 1],
        shed=[0],
    )
    (moment,) = DecisionReader([write_log(tmp_path / "log.jsonl", told)])
    assert moment.queue == QueueView([100.02, 100.1], [(WIDE,), (NARROW,)], {(WIDE,): 1, (NARROW,): 1})
    assert (moment.load.interference, moment.load.hop_s, moment.now) == (1.1, 0.001, 100.0)
    assert derived(tmp_path / "log.jsonl").different == 0


def test_a_server_is_derived_again_from_its_own_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole application: bursts, pins, floors, and images that name no budget."""
    monkeypatch.setattr(PlanInputs, "make_beside", PlanInputs.make, raising=False)  # another process takes a second

    async def scenario(site: Site) -> None:
        headers = [{"X-Latency-Budget-Ms": str(ms)} for ms in (30, 60, 100, 150, 400)]
        headers += [{}, {"X-Width": "0.5"}, {"X-Latency-Budget-Ms": "200", "X-Min-Accuracy": "0.6"}]
        for burst in (1, 3, 12, 30, 5):
            await asyncio.gather(*(site.classify(headers=headers[i % len(headers)]) for i in range(burst)))
        await asyncio.sleep(0.3)

    site = Runner(read_checkpoint(write_toy(tmp_path / "toy")))
    site(scenario, decision_log=tmp_path / "log", profile_dir=tmp_path / "profiles")
    report = derived(tmp_path / "log", "fixed:0.25")
    assert report.decisions > 10
    assert report.different == 0
    recorded, narrowest = report.tallies.values()
    assert len(recorded.images) > 1
    assert narrowest.images[NARROW] > 0
    assert set(narrowest.images) - {NARROW}, "pins and floors hold under every policy"


# -- another policy on the same situations


def test_another_policy_is_judged_on_the_same_situations(tmp_path: Path) -> None:
    late = decided([0.005, 0.1], 1.0, [1], 0.04, shed=[0])
    log = write_log(tmp_path / "log.jsonl", ONE_WITH_TIME, ONE_IN_HASTE, TWO, late, plan=None)
    report = derived(log, "threshold")  # idle, so at the widest, which 20 ms are too few for
    assert report.different == 0
    recorded, other = report.tallies["slackfit (recorded)"], report.tallies["threshold"]
    assert recorded.images == {WIDE: 4, NARROW: 1}
    assert (recorded.in_time, recorded.shed) == (5, 1)
    assert recorded.in_time_share == pytest.approx(5 / 6)
    assert recorded.mean_accuracy == pytest.approx((4 * 0.7 + 0.5) / 5)
    assert other.images == {WIDE: 5}
    assert (other.in_time, other.shed) == (4, 1)
    assert other.mean_accuracy == pytest.approx(0.7)


def test_a_fixed_width_takes_whoever_allows_it(tmp_path: Path) -> None:
    pinned = decided([0.1, 0.1], 1.0, [0, 1], 0.048, kinds=[[0.25, 1.0], [1.0]], kind_of=[0, 1], reason="x")
    log = write_log(tmp_path / "log.jsonl", pinned, header=HEADER | {"policy": "adaptive"}, plan=asdict(plan_inputs()))
    (moment,) = DecisionReader([log])
    narrow, wide, free = (Player(name).decide(moment) for name in ("fixed:0.25", "fixed:1", "adaptive"))
    assert (narrow.width, [*narrow.batch]) == (NARROW, [0])
    assert (wide.width, [*wide.batch]) == (WIDE, [0, 1])
    assert free.width in (NARROW, WIDE)


def test_what_a_fixed_server_recorded_is_open_to_all_widths(tmp_path: Path) -> None:
    only_narrow = asdict(plan_inputs()) | {"seconds": [[[1, 0.010], [2, 0.012]], []]}
    told = decided([10.0], 0.25, [0], 0.01, kinds=[[0.25]], reason="adaptive")
    log = write_log(tmp_path / "log.jsonl", told, header=HEADER | {"policy": "fixed:0.25"}, plan=only_narrow)
    report = derived(log, "adaptive")
    assert report.different == 0
    assert report.tallies["adaptive"].images == {WIDE: 1}


def test_a_policy_that_plans_needs_the_record_of_one(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", ONE_WITH_TIME)
    assert refusal(log, "adaptive") == (
        f"{log} was recorded under the policy slackfit, which plans nothing: to judge adaptive, record under adaptive "
        "or fixed:<width>"
    )


def test_a_policy_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", ONE_WITH_TIME)
    assert "does not exist" in refusal(log, "magic")
    assert "was not trained" in refusal(log, "fixed:0.5")


def bands(now: float, busy: float, wide: bool, memory: list[float]) -> dict[str, Any]:
    """Decided by the bands of utilisation, which make a step down from the widest once in half a busy second."""
    width, predicted_s = (1.0, 0.04) if wide else (0.25, 0.01)
    more = {"now": now, "load": LOAD | {"busy": busy}, "reason": "threshold", "memory": memory}
    return decided([now + 1], width, [0], predicted_s, **more)


def test_what_a_policy_remembered_is_known_where_earlier_decisions_are_not(tmp_path: Path) -> None:
    steps = [bands(0.0, 0.6, True, [0, 0.0]), bands(1.0, 0.9, False, [0, 0.5]), bands(1.2, 0.6, False, [1, 1.5])]
    after = [{"gap": 3}, {"profile": CELLS}, {"plan": None}]
    header = HEADER | {"policy": "threshold", "part": 2}
    log = tmp_path / "log.jsonl"
    for lines in (steps, steps[2:], [steps[0], *after, steps[2], *after, bands(1.4, 0.9, True, [0, 1.5])]):
        assert derived(write_log(log, *lines, header=header)).different == 0
    assert derived(write_log(log, bands(1.2, 0.6, False, [0, 1.5]), header=header)).different == 1


def test_every_file_of_a_policy_that_remembers_stands_by_itself(tmp_path: Path) -> None:
    """Two busy seconds, then neither busy nor idle ones: at the narrowest from the first step on."""
    profile, policy, both = make_profile(), policy_of("threshold"), (NARROW, WIDE)
    log = DecisionLog(tmp_path, 2**20, model="toy", policy="threshold", profile=profile, dropped=lambda count: None)
    for i in range(500):  # about 600 bytes each
        now, load = i / 100, Load(busy=0.9 if i < 200 else 0.6)
        queue = QueueView([now + 1 + k / 7 for k in range(40)], [both] * 40, {both: 40})
        log.decided(queue, load, now, policy(queue, load, profile, now))
    log.start()
    log.close()
    files = log_files(tmp_path)
    assert len(files) > 2
    for path in files:
        report = derived(path, "slackfit")
        assert report.different == 0
        assert [*report.tallies["threshold (recorded)"].images] == [NARROW]


def test_what_a_judged_policy_remembers_goes_from_file_to_file_but_not_to_another_server(tmp_path: Path) -> None:
    header = HEADER | {"policy": "threshold"}
    calm, busy = bands(1.2, 0.6, True, [0, 9.0]), bands(1.0, 0.9, True, [0, 9.0])
    write_log(tmp_path / "decisions-1.jsonl", busy, header=header)
    write_log(tmp_path / "decisions-2.jsonl", calm, header=header | {"part": 2})
    write_log(tmp_path / "decisions-3.jsonl", calm, header=header | {"started": "2026-02-01"})
    player = Player("threshold")
    widths = [player.decide(moment).width for moment in DecisionReader(log_files(tmp_path))]
    assert widths == [NARROW, NARROW, WIDE]


# -- what is missing or damaged


def test_gaps_are_counted(tmp_path: Path) -> None:
    after = [{"gap": 3}, {"profile": CELLS}, {"plan": None}]
    reader = DecisionReader([write_log(tmp_path / "log.jsonl", TWO, *after, TWO, *after, TWO)])
    assert derive(reader).identical == 3
    assert (reader.gaps, reader.missing) == (2, 6)


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    first = write_log(tmp_path / "decisions-1.jsonl", TWO, HALF_A_LINE)
    empty = tmp_path / "decisions-2.jsonl"
    empty.write_text("")
    write_log(tmp_path / "decisions-3.jsonl", TWO)
    reader = DecisionReader(log_files(tmp_path))
    assert derive(reader).identical == 2
    assert reader.cut_off == [first]


@pytest.mark.parametrize(
    "line",
    [
        HALF_A_LINE + "\n",
        "\n",
        "[]\n",
        "{}\n",
        b"\xff\n".decode("latin-1"),
        {"surprise": 1},
        {"decision": {"now": 1.0}},
        {"decision": ONE_WITH_TIME["decision"] | {"width": 7}},
        {"decision": ONE_WITH_TIME["decision"] | {"kinds": []}},
        {"decision": ONE_WITH_TIME["decision"] | {"memory": [1, 2.0, 3]}},
        {"decision": ONE_WITH_TIME["decision"] | {"load": {"speed": 1}}},
        {"cells": [[0.25, 1]]},
        {"profile": 5},
        {"plan": {"budgets_s": []}},
        {"header": HEADER | {"format": 2}},
        {"header": HEADER | {"buckets": [3]}},
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: Any) -> None:
    log = write_log(tmp_path / "log.jsonl", TWO, line, TWO)
    told = refusal(log)
    assert told.startswith(f"{log}, line 5 is no line of a decision log (")
    assert told.endswith("): move the file away and replay the others")
    assert "\n" not in told


def test_decisions_without_what_they_need_are_damage(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps(TWO) + "\n")
    assert "line 1 is no line of a decision log" in refusal(tmp_path / "log.jsonl")


def test_a_folder_without_a_log_says_how_to_make_one(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path} holds no decisions-*.jsonl: record decisions with scala-serve serve --decision-log {tmp_path}"
    )


# -- the command


def test_the_command_ends_with_a_line_of_json(run: Any, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", ONE_WITH_TIME, ONE_IN_HASTE, TWO)
    outcome = run(log, "--policy", "threshold")
    assert outcome.exit_code == 0, outcome.output
    figures = json.loads(outcome.stdout.splitlines()[-1])
    policies = figures.pop("policies")
    assert figures == {"decisions": 3, "identical": 3, "different": 0, "gaps": 0, "dropped": 0}
    assert policies["threshold"]["widths"] == {"1": 4}
    assert policies["slackfit (recorded)"] == {
        "widths": {"0.25": 1, "1": 3},
        "shed": 0,
        "in_time_share": 1.0,
        "mean_accuracy": pytest.approx(0.65),
    }
    assert "run at width 0.25" in outcome.stdout


def test_the_command_names_the_first_difference_and_ends_with_1(run: Any, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", TWO, decided([0.1], 0.25, [0], 0.01), HALF_A_LINE)
    outcome = run(log)
    assert outcome.exit_code == 1
    assert f"{log}, line 5 recorded Decision(width=Width(0.25)" in outcome.stderr
    assert f"{log} ends in the middle of a line" in outcome.stderr
    assert json.loads(outcome.stdout.splitlines()[-1])["different"] == 1


def test_no_decision_is_no_proof(run: Any, tmp_path: Path) -> None:
    outcome = run(write_log(tmp_path / "log.jsonl"))
    assert isinstance(outcome.exception, ValueError)
    assert "holds no decision" in str(outcome.exception)
