"""How a run is judged, on outcomes worked out by hand; and that every policy plays the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from server.simulation.baselines import Tuning
from server.simulation.experiment import bound, judge, paired, policies, run, students_t, switching
from server.simulation.scenarios import SELECTION, Scenario, ladder, scenarios, training
from server.simulation.simulator import Outcome, Run
from server.simulation.workload import Workload
from tests.unit.simulated import MIDDLE, NARROW, TICK_S, WIDE, frontend, traffic
from tests.unit.simulated_machine import CORRECT, make_machine

CALM = Scenario("calm", "stationary", "poisson", 0.5, 4.0)
MIXED = Tuning()


def outcome_of(
    fates: Sequence[float | str], widths: Sequence[int], runs: Sequence[tuple[float, float, int, int]]
) -> Outcome:
    """``fates`` in ticks, "refused" or "dropped"; ``runs`` as (start, ticks, width, images)."""
    finished = [fate * TICK_S if isinstance(fate, float | int) else np.nan for fate in fates]
    return Outcome(
        np.array(finished),
        np.array(widths, np.int8),
        np.array([fate == "refused" for fate in fates]),
        [Run(start * TICK_S, ticks * TICK_S, 0.0, width, images) for start, ticks, width, images in runs],
    )


def asking_for(workload: Workload, images: Sequence[int]) -> Workload:
    return Workload(workload.name, workload.arrivals_s, workload.budgets_s, np.array(images))


def test_every_arrival_counts() -> None:
    # Images 4, 5, 7, 0, 0, 0. A batch of two at the widest from 0 to 48, one at the narrowest from 48 to 58.
    workload = asking_for(traffic((0, 50), (0, 40), (0, 60), (1, 9), (1, 9), (4, 60)), [4, 5, 7, 0, 0, 0])
    outcome = outcome_of(
        [48, 48, 58, "refused", "dropped", "refused"],
        [WIDE, WIDE, NARROW, -1, -1, -1],
        [(0, 48, WIDE, 2), (48, 10, NARROW, 1)],
    )
    result = judge(outcome, workload, make_machine())
    assert result.arrivals == 6
    assert result.attainment == 2 / 6  # the second is 8 ticks late
    assert result.attainment_admitted == 2 / 4
    assert result.effective_accuracy == 1 / 6  # image 4 is right at the widest, image 7 nowhere
    assert result.expected_accuracy == pytest.approx((6 / 8 + 4 / 8) / 6)
    assert result.mean_width == pytest.approx((1 + 1 + 0.25) / 3)
    assert (result.refused, result.expired, result.late) == (2, 1, 1)
    assert result.wasted == pytest.approx(24 / 58)  # half of the first batch
    assert result.switches_per_s == pytest.approx(1 / (4 * TICK_S))  # the last arrival is at 4
    assert result.widest == 2 / 6
    assert result.p50_ms == pytest.approx(48_000 * TICK_S)
    assert result.p99_ms == pytest.approx(np.quantile([48, 48, 58], 0.99) * 1000 * TICK_S)


def test_answers_on_their_way_are_their_own_runs() -> None:
    """The first answer leaves 12 after its run has ended, when the second run is half done."""
    machine = make_machine(frontend(hop=3, respond=12))
    outcome = outcome_of([25, 48], [NARROW, MIDDLE], [(0, 10, NARROW, 1), (13, 20, MIDDLE, 1)])
    assert judge(outcome, traffic((0, 99), (0, 30)), machine).wasted == pytest.approx(20 / 30)
    assert judge(outcome, traffic((0, 20), (0, 99)), machine).wasted == pytest.approx(10 / 30)


def test_nothing_answered_is_nothing_wasted() -> None:
    result = judge(outcome_of(["refused", "refused"], [-1, -1], []), traffic((0, 1), (0, 1)), make_machine())
    assert (result.attainment, result.attainment_admitted, result.wasted, result.p99_ms) == (0, 1, 0, 0)
    assert result.switches_per_s == 0


# -- runs


@pytest.mark.parametrize("policy", ["ours", "fixed:0.5", "slackfit", "threshold", "F-1", "SF-b+EDF"])
def test_an_idle_machine_serves_everybody_and_no_better_than_the_bound(policy: str) -> None:
    machine = make_machine(frontend(decode=1, hop=1, respond=1))
    result = run(machine, CALM, policy, MIXED, seed=3)
    assert result == run(machine, CALM, policy, MIXED, seed=3)
    assert result != run(machine, CALM, policy, MIXED, seed=4)
    assert 0.5 < result.expected_accuracy <= bound(machine, CALM, seed=3)


def test_everybody_gets_the_same_traffic() -> None:
    arrivals = {name: run(make_machine(), CALM, name, MIXED, seed=3).arrivals for name in ("ours", "F-1", "CW-0.25")}
    assert len(set(arrivals.values())) == 1


def test_the_bound_is_that_of_an_idle_device_when_it_is_idle() -> None:
    machine = make_machine()
    easy = Scenario("easy", "stationary", "poisson", 0.05, 20.0, "1000")
    assert bound(machine, easy, seed=1) == pytest.approx(6 / 8)
    impossible = Scenario("hopeless", "budgets", "poisson", 0.5, 4.0, "hostile")
    assert bound(machine, impossible, seed=1) == 0
    # one image takes 10, 20 or 40 ticks: a budget of 15 leaves the narrowest width
    narrow = Scenario("tight", "budgets", "poisson", 0.05, 20.0, str(15_000 * TICK_S))
    assert bound(machine, narrow, seed=1) == pytest.approx(4 / 8)


def test_only_who_learns_notices_a_neighbour() -> None:
    beside = Scenario("beside", "mishaps", "poisson", 1.5, 6.0, "100", "neighbour")
    learning, static = (run(make_machine(), beside, name, MIXED, seed=1) for name in ("ours", "ours-static"))
    assert static.late > 5 * max(1, learning.late)
    assert learning.attainment_admitted > static.attainment_admitted + 0.05


def test_a_killed_worker_costs_what_comes_while_it_is_away() -> None:
    killed = Scenario("killed", "mishaps", "poisson", 0.3, 10.0, "1000", "killed")
    result = run(make_machine(), killed, "F-0.25", MIXED, seed=1)
    whole = run(make_machine(), Scenario("whole", "mishaps", "poisson", 0.3, 10.0, "1000"), "F-0.25", MIXED, seed=1)
    assert whole.attainment == 1
    assert result.refused / result.arrivals == pytest.approx(0.1, abs=0.05)  # away for a tenth of the time
    assert result.late == 0
    assert result.expired <= 2


def test_the_table_of_rates_goes_to_narrower_widths() -> None:
    machine = make_machine()
    steps = [Scenario("step", "stationary", "poisson", load, 6.0, "120") for load in (0.2, 3.0)]
    assert switching(machine, steps, edf=False, seed=1) == ((0.2 * 64, WIDE), (3.0 * 64, NARROW))


def test_policies_have_the_names_of_the_settings_and_of_the_rules() -> None:
    names = policies(make_machine(), "40-200", MIXED).keys()
    assert {
        "ours",
        "ours-static",
        "slackfit",
        "threshold",
        "fixed:0.5",
        "F-0.5",
        "F-0.5+EDF",
        "SF-a",
        "MS+EDF",
    } <= names


# -- several runs


def test_paired_differences_have_students_interval() -> None:
    interval = paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert interval.mean == 2
    half = 4.3027 / 3**0.5  # standard deviation 1, two degrees of freedom
    assert (interval.high - 2, 2 - interval.low) == pytest.approx((half, half), rel=0.01)
    assert paired([3.0, 1.0, 2.0], [2.0, 0.0, 1.0]).low == 1


@pytest.mark.parametrize(("freedom", "quantile"), [(2, 4.3027), (4, 2.7764), (9, 2.2622), (29, 2.0452), (1000, 1.9623)])
def test_students_quantiles(freedom: int, quantile: float) -> None:
    assert students_t(freedom) == pytest.approx(quantile, rel=0.01)


# -- scenarios


def test_a_scenario_is_the_traffic_of_its_words() -> None:
    machine = make_machine()
    workload = Scenario("x", "stationary", "poisson", 2.0, 50.0, "80").workload(machine, seed=1)
    assert workload.rate == pytest.approx(2 * 64, rel=0.05)
    assert set(workload.budgets_s.tolist()) == {0.08}
    assert workload.images.max() < len(CORRECT)


def test_each_seed_sees_another_window_of_a_recording(tmp_path: Path) -> None:
    recording = tmp_path / "r.csv"
    recording.write_text("TIMESTAMP\n" + "".join(f"2023-11-16 18:00:{k * k / 100:09.6f}\n" for k in range(70)))
    played = Scenario("trace", "changing", f"trace:{recording}", 0.5, 1.0)
    first, again, other = (played.workload(make_machine(), seed).arrivals_s.tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_scenarios_are_told_apart_by_their_labels() -> None:
    machine, recording = make_machine(), Path("r.csv")
    for full in (False, True):
        labels = [one.label for one in scenarios(machine, recording, full=full)]
        assert len(set(labels)) == len(labels)
        assert set(labels) >= SELECTION
    assert "trace 1.5x" not in [one.label for one in scenarios(machine, None, full=False)]
    assert {one.seconds for one in scenarios(machine, None, full=False)} == {4000 / 64}
    loads = [one.load for one in ladder(machine, full=False)]
    assert loads[0] == 0.3
    assert loads == sorted(loads)
    assert loads[-1] > 4
    assert {one.seconds for one in training(machine, full=True)} == {8000 / 64}
