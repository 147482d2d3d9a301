"""When a new plan is made and from what. Mostly without making one: that takes a while."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pytest

from scala_model.width import Width
from server import planner as planner_module
from server.latency_profile import SAMPLES, LatencyProfile
from server.load_monitor import LoadMonitor
from server.planner import BUDGET_CHANGE, EVERY_S, LATENCY_CHANGE, PAUSE_S, PlanInputs, Planner
from server.policies.adaptive import Adaptive
from server.policies.plan import Plan, make_plan
from tests.unit.situations import (
    ALL,
    IDLE,
    MEASURED,
    MIDDLE,
    NARROW,
    WIDE,
    due,
    make_profile,
    plan_that_ranks,
    queue_of,
)
from tests.unit.virtual_time import Clock, run

NOW = 1000.0


class Desk:
    """A planner and what it looks at. ``told`` are the inputs of its plans, of which none is really made."""

    def __init__(self, widths: tuple[Width, ...] = ALL, profile: LatencyProfile | None = None) -> None:
        self.policy, self.monitor, self.profile = Adaptive(), LoadMonitor(), profile or make_profile()
        self.told: list[PlanInputs] = []
        self.planner = Planner(self.policy, self.profile, self.monitor, widths, 1.0, 256, self.told.append)

    def plans_anew(self) -> bool:
        before = len(self.told)
        self.planner.refresh(NOW)
        return len(self.told) > before

    def ask(self, budget_s: float, count: int) -> None:
        for _ in range(count):
            self.monitor.arrived(1, budget_s, 1.0, NOW)


@pytest.fixture(autouse=True)
def _no_real_plan() -> Iterator[None]:
    with mock.patch.object(PlanInputs, "make", return_value=plan_that_ranks((0, 1, 1.0))):
        yield


# -- when


def test_before_anything_is_warmed_there_is_nothing_to_plan() -> None:
    desk = Desk(profile=LatencyProfile(MEASURED, 4))
    assert not desk.plans_anew()
    assert desk.policy.plan is None
    desk.profile.record(NARROW, 1, [0.010])
    assert desk.plans_anew()
    assert desk.policy.plan is not None


def test_a_plan_holds_as_long_as_nothing_changes() -> None:
    desk = Desk()
    assert desk.plans_anew()
    plan = desk.policy.plan
    assert not any(desk.plans_anew() for _ in range(5))
    assert desk.policy.plan is plan


def test_a_cell_that_comes_or_goes_makes_a_new_plan() -> None:
    desk = Desk(profile=make_profile(widths=(NARROW, WIDE)))
    assert desk.plans_anew()
    desk.profile.record(MIDDLE, 1, [0.020])
    assert desk.plans_anew()
    desk.profile.withdraw(WIDE, 4)
    assert desk.plans_anew()
    assert not desk.plans_anew()


@pytest.mark.parametrize("direction", [1, -1])
def test_a_latency_that_moves_far_makes_a_new_plan(direction: int) -> None:
    desk = Desk()
    desk.plans_anew()
    for share, anew in ((0.9, False), (1.1, True)):
        factor = LATENCY_CHANGE ** (direction * share)
        desk.profile.record(MIDDLE, 2, [0.024 * factor] * SAMPLES)
        assert desk.plans_anew() is anew


def test_latencies_that_creep_are_compared_with_those_of_the_last_plan() -> None:
    desk = Desk()
    desk.plans_anew()
    anew = []
    for step in range(1, 9):
        desk.profile.record(MIDDLE, 2, [0.024 * LATENCY_CHANGE ** (0.3 * step)] * SAMPLES)
        anew.append(desk.plans_anew())
    assert anew == [False, False, False, True, False, False, False, True]


def test_budgets_that_move_make_a_new_plan() -> None:
    desk = Desk()
    desk.ask(0.100, 500)
    assert desk.plans_anew()
    desk.ask(0.100 * BUDGET_CHANGE**0.9, 500)
    assert not desk.plans_anew()
    desk.ask(0.100 * BUDGET_CHANGE**1.1, 500)
    assert desk.plans_anew()
    desk.ask(0.300, 10)  # of five hundred
    assert not desk.plans_anew()


# -- from what


def test_a_plan_is_made_from_the_medians_of_all_cells_on_offer() -> None:
    desk = Desk()
    desk.profile.withdraw(WIDE, 2)
    desk.plans_anew()
    [inputs] = desk.told
    assert inputs.seconds == (
        ((1, 0.010), (2, 0.012), (4, 0.016)),
        ((1, 0.020), (2, 0.024), (4, 0.032)),
        ((1, 0.040),),
    )
    assert inputs.accuracy == (0.5, 0.6, 0.7)
    assert inputs.max_waiting == 256


def test_a_fixed_width_is_the_only_one_planned_for() -> None:
    desk = Desk(widths=(MIDDLE,))
    desk.plans_anew()
    assert [len(row) for row in desk.told[0].seconds] == [0, 3, 0]


def test_before_somebody_asked_the_default_budget_is_expected() -> None:
    desk = Desk()
    desk.plans_anew()
    assert set(desk.told[0].budgets_s) == {1.0}


def test_budgets_are_those_of_recent_requests() -> None:
    desk = Desk()
    desk.ask(0.050, 250)
    desk.ask(0.200, 250)
    desk.plans_anew()
    budgets = desk.told[0].budgets_s
    assert (budgets.count(0.05), budgets.count(0.2), len(budgets)) == (8, 8, 16)


def test_what_passes_beside_the_engine_is_learnt_slowly() -> None:
    """A hop of 10 ms to the device and 20 ms back to the caller: the former between batches, the latter off budgets."""
    desk = Desk()
    desk.monitor.hop.observe(0.010, NOW)
    desk.monitor.respond.observe(0.020, NOW)
    for _ in range(30):
        desk.plans_anew()
    first, *_, last = desk.told
    assert first.overhead_s == pytest.approx(0.003)
    assert first.budgets_s[0] == pytest.approx(0.994)
    assert first.overhead_s < last.overhead_s <= 0.010
    assert len(desk.told) < 6


def test_no_budget_is_planned_for_as_less_than_a_millisecond() -> None:
    desk = Desk()
    desk.ask(0.0001, 10)
    desk.plans_anew()
    assert min(desk.told[0].budgets_s) == 0.001


def test_where_lateness_costs_more_than_narrow_networks_less_of_the_budgets_is_counted_on() -> None:
    """A tenth less with each look, down to three tenths; once narrowness costs more, ever more, and never more than
    there is."""

    async def scenario(clock: Clock) -> None:
        desk = Desk()
        desk.ask(0.100, 500)

        def counted_on(in_time: bool, looks: int, worth: float = 0.95) -> float:
            for _ in range(looks):
                for k in range(200):  # a tenth is late, or one in a hundred
                    desk.monitor.settled(worth if k % (100 if in_time else 10) else None, clock.now)
                clock.now += EVERY_S
                desk.planner.refresh(clock.now)
            return desk.told[-1].budgets_s[0] / 0.100

        assert counted_on(True, 5) == pytest.approx(1.0)
        shares = [counted_on(False, 1) for _ in range(12)]
        assert shares == sorted(shares, reverse=True)
        fallen = next(share for share in shares if share < 1)
        assert fallen == pytest.approx(0.9**3), "a plan is made anew when budgets move by three tenths"
        assert 0.3 <= counted_on(False, 10) <= 0.3 * BUDGET_CHANGE
        assert counted_on(True, 10) <= 0.3 * BUDGET_CHANGE, "what has been seen lasts for some seconds"
        assert 1 / BUDGET_CHANGE <= counted_on(True, 200) <= 1.0

    run(scenario)


# -- beside the event loop


def test_a_running_server_plans_beside_its_requests() -> None:
    """What changes is planned for within half a second, and then not again for two."""

    async def scenario(clock: Clock) -> None:
        desk, instants = Desk(), list[float]()

        async def make_beside(inputs: PlanInputs) -> Plan:
            instants.append(clock.now)
            return plan_that_ranks((1, 1, 1.0))

        with mock.patch.object(PlanInputs, "make_beside", make_beside):
            keeping, started = asyncio.create_task(desk.planner.keep_fresh()), clock.now
            await asyncio.sleep(10)
            assert instants == [pytest.approx(started + EVERY_S)]
            desk.profile.withdraw(WIDE, 4)
            await asyncio.sleep(EVERY_S + 0.01)
            desk.profile.withdraw(WIDE, 2)
            await asyncio.sleep(10)
            first, second = instants[1:]
            assert second - first == pytest.approx(PAUSE_S + EVERY_S)
            keeping.cancel()
        decision = desk.policy(queue_of(due(1000)), IDLE, desk.profile, 0.0)
        assert decision.width == MIDDLE

    run(scenario)


def test_where_no_process_can_be_started_a_thread_plans() -> None:
    async def scenario(clock: Clock) -> None:
        desk = Desk()
        with mock.patch.object(PlanInputs, "make_beside", side_effect=OSError("no memory")):
            keeping = asyncio.create_task(desk.planner.keep_fresh())
            await asyncio.sleep(5)
            keeping.cancel()
        assert len(desk.told) == 1
        assert desk.policy.plan is not None

    run(scenario)


def test_a_plan_that_cannot_be_made_leaves_the_last_one_in_force(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(clock: Clock) -> None:
        desk = Desk()
        desk.planner.refresh(clock.now)
        before = desk.policy.plan
        desk.profile.withdraw(WIDE, 4)
        with mock.patch.object(PlanInputs, "make_beside", side_effect=np.linalg.LinAlgError("singular")):
            keeping = asyncio.create_task(desk.planner.keep_fresh())
            await asyncio.sleep(10)
            assert not keeping.done()
            assert desk.policy.plan is before
            keeping.cancel()
        assert "going on with the last" in caplog.text

    run(scenario)


def test_without_memory_to_see_what_is_new_the_last_plan_stays_in_force(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(clock: Clock) -> None:
        desk = Desk()
        with mock.patch.object(Planner, "_gathered", side_effect=MemoryError):
            keeping = asyncio.create_task(desk.planner.keep_fresh())
            await asyncio.sleep(10)
            assert not keeping.done()
            keeping.cancel()
        assert "going on with the last" in caplog.text

    run(scenario)


def test_another_process_makes_the_same_plan() -> None:
    inputs = PlanInputs((((1, 0.010), (2, 0.015)),), (0.7,), (0.05, 0.1), 4, 0.001)
    here = make_plan(inputs.seconds, inputs.accuracy, inputs.budgets_s, 4, 0.001)
    there = asyncio.run(inputs.make_beside())
    for rate, waiting in ((1, 1), (50, 2), (500, 4)):
        assert there.ranked(rate, 1.0, waiting) == here.ranked(rate, 1.0, waiting)


def test_the_planning_process_runs_nothing_of_the_folder_that_the_server_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "__init__.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    inputs = PlanInputs((((1, 0.010), (2, 0.015)),), (0.7,), (0.05, 0.1), 4, 0.001)
    assert asyncio.run(inputs.make_beside()).ranked(1, 1.0, 1)


def test_a_planning_process_that_fails_is_an_error_of_the_system() -> None:
    with pytest.raises(OSError, match="exit code 1"):
        asyncio.run(PlanInputs((), (), (), 4, 0.0).make_beside())


def test_a_planning_process_that_gets_no_time_is_killed() -> None:
    """A thread of ours would get none either, and hold requests up."""
    desk = Desk()
    inputs = PlanInputs((((1, 0.010), (2, 0.015)),), (0.7,), (0.05, 0.1), 4, 0.001)

    async def starve() -> None:
        with mock.patch.object(planner_module, "PATIENCE_S", 0.05), pytest.raises(TimeoutError):
            await desk.planner._made(inputs)

    processes = psutil.Process().children()
    asyncio.run(starve())
    assert [child for child in psutil.Process().children() if child not in processes and child.is_running()] == []
