"""Plans against small cases that are solved in another way, and what must hold on any machine."""

from __future__ import annotations

import io
import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest

from server.policies.plan import LEVELS, STEP, Action, Plan, _arrivals, make_plan
from server.simulation.machines import built_in
from tests.unit.situations import PROFILE, plan_for

Rows = Sequence[Sequence[tuple[int, float]]]  # of each width: images and seconds
ENDLESS = [1000.0]  # budgets in seconds
ARRIVALS = 3000
WIDTHS: Rows = [[(1, 0.010)], [(1, 0.030)]]
ACCURACY = [0.6, 0.8]
NARROW, WIDE = range(2)


def rates(plan: Plan) -> list[float]:
    return [float(plan.lowest_rate[0]) * STEP**level for level in range(LEVELS)]


def best(plan: Plan, rate: float, waiting: int) -> Action:
    return plan.ranked(rate, 1.0, waiting)[0]


def gain(plan: Plan, rate: float) -> float:
    """Right answers a second. An empty queue leads to one image after 1 / rate seconds, so that is what it is worth."""
    return rate * best(plan, rate, 1).worth


# -- solved in another way


def gain_of(serving: Sequence[int], rate: float) -> float:
    """Right answers a second when ``serving[n - 1]`` is the width for n waiting images, of which there are two at most.

    The embedded chain: from none to one; from one, to as many as arrive during its service, two at most; from two, to
    one if nobody arrives, or to two again. Its stationary weights are 1 for the state of one image, and from there on.
    """
    (first_s, second_s), (first, second) = ([WIDTHS[w][0][1] for w in serving], [ACCURACY[w] for w in serving])
    none, one, none_later = math.exp(-rate * first_s), rate * first_s * math.exp(-rate * first_s), 0.0
    none_later = math.exp(-rate * second_s)
    empty, full = none, (1 - none - one) / none_later
    return (first + full * second) / (first_s + full * second_s + empty / rate)


def test_two_widths_and_room_for_two_are_solved_by_hand() -> None:
    """Of the four ways to serve a queue of one or two the best one is found, and what it earns."""
    plan = make_plan(WIDTHS, ACCURACY, ENDLESS, max_waiting=2)
    found = set()
    for rate in rates(plan):
        earned = {serving: gain_of(serving, rate) for serving in product((NARROW, WIDE), repeat=2)}
        serving = (best(plan, rate, 1).width, best(plan, rate, 2).width)
        found.add(serving)
        assert earned[serving] == pytest.approx(max(earned.values()), rel=1e-4)
        assert gain(plan, rate) == pytest.approx(max(earned.values()), rel=5e-3)
    assert found == {(WIDE, WIDE), (WIDE, NARROW), (NARROW, NARROW)}, "as more arrive"


def test_one_width_without_deadlines_serves_all_that_come_or_as_many_as_it_can() -> None:
    plan = make_plan([[(1, 0.010)]], [0.7], ENDLESS, max_waiting=64)
    for rate in rates(plan):
        if not 80 < rate < 125:  # close to 100/s, what finds the queue full is not negligible
            assert gain(plan, rate) == pytest.approx(0.7 * min(rate, 100.0), rel=0.01)
    assert 0.93 * 70 < gain(plan, 100.0) < 70


def test_batches_raise_what_can_be_served() -> None:
    """Four in the time of two: up to 200/s instead of 100."""
    plan = make_plan([[(1, 0.010), (2, 0.013), (4, 0.020)]], [0.7], ENDLESS, max_waiting=64)
    assert gain(plan, rates(plan)[-1]) == pytest.approx(0.7 * 200, rel=0.01)
    assert best(plan, rates(plan)[-1], 64) == best(plan, rates(plan)[-1], 9)
    assert best(plan, rates(plan)[-1], 64).batch == 4


Rule = Callable[[int], tuple[int, int]]  # how many wait -> index of the width, images


def earned(rule: Rule, rows: Rows, accuracy: Sequence[float], budget_s: float, rate: float) -> float:
    """The share of right answers: Poisson arrivals in front of one device, served in the order of their arrival. Who
    would be late in the batch that the rule wants leaves unserved."""
    chance, instants, clock = random.Random(0), list[float](), 0.0
    for _ in range(ARRIVALS):
        clock += chance.expovariate(rate)
        instants.append(clock)
    right, first, here, now = 0.0, 0, 0, 0.0
    while first < ARRIVALS:
        now = max(now, instants[first])
        here = bisect_right(instants, now)
        width, size = rule(here - first)
        sizes, seconds = zip(*rows[width], strict=True)
        taken = float(np.interp(min(size, here - first), sizes, seconds))
        first = bisect_left(instants, now + taken - budget_s, first)
        if batch := min(size, here - first):
            right += accuracy[width] * batch
            first += batch
            now += taken
    return right / ARRIVALS


@pytest.mark.parametrize("load", [0.5, 1.0, 1.5, 2.5])
def test_no_constant_rule_earns_more_than_the_plan(load: float) -> None:
    """Simulated independently, with real deadlines: within half a point of the best width and batch in hindsight. And
    the plan knows what it earns."""
    rows: Rows = [[(1, 0.004), (2, 0.007), (4, 0.012)], [(1, 0.008), (2, 0.014), (4, 0.025)]]
    accuracy, budget_s, rate = [0.6, 0.75], 0.08, load * 4 / 0.025
    plan = make_plan(rows, accuracy, [budget_s], max_waiting=64)

    def planned(waiting: int) -> tuple[int, int]:
        return best(plan, rate, waiting)[:2]

    constant = [
        earned(lambda waiting: rule, rows, accuracy, budget_s, rate)  # noqa: B023
        for rule in product((NARROW, WIDE), (1, 2, 4))
    ]
    ours = earned(planned, rows, accuracy, budget_s, rate)
    assert ours > max(constant) - 0.005
    assert gain(plan, nearest(plan, rate)) / nearest(plan, rate) == pytest.approx(ours, abs=0.03)


def nearest(plan: Plan, rate: float) -> float:
    return min(rates(plan), key=lambda each: abs(math.log(each / rate)))


# -- on any machine


@cache
def machine_plan(name: str) -> tuple[Plan, list[float], list[int]]:
    """Of a built-in machine with budgets of 40 to 200 ms; the accuracies; how many may wait."""
    profile = built_in(name).profile()
    plan = plan_for(profile, *np.linspace(40, 200, 16).tolist(), max_waiting=256)
    return plan, list(profile.accuracy.values()), [1, 2, 3, 5, 9, 17, 40, 80, 120, 160]


MACHINES = pytest.mark.parametrize("name", ["cpu", "gpu"])


@MACHINES
def test_while_few_come_the_widest_serves_all_and_when_too_many_come_the_narrowest(name: str) -> None:
    plan, accuracy, queues = machine_plan(name)
    for waiting in (1, 2, 3):
        action = best(plan, 0.0, waiting)
        assert action.width == len(accuracy) - 1
        assert action.batch >= waiting
    assert {best(plan, rates(plan)[-1], waiting).width for waiting in queues} == {0}
    assert best(plan, 0.0, 2) == best(plan, rates(plan)[0], 2)
    assert best(plan, 1e9, 2) == best(plan, rates(plan)[-1], 2)


@MACHINES
def test_the_more_arrive_the_less_accurate_is_the_best_action(name: str) -> None:
    """On average over queues; a single one may gain where batches are worth more."""
    plan, accuracy, queues = machine_plan(name)
    means = [np.mean([accuracy[best(plan, rate, waiting).width] for waiting in queues]) for rate in rates(plan)]
    assert all(after <= before + 1e-9 for before, after in pairwise(means))
    assert means[0] > means[-1] + 0.05


@MACHINES
def test_the_more_wait_the_less_accurate_is_the_best_action(name: str) -> None:
    plan, accuracy, queues = machine_plan(name)
    for rate in rates(plan)[::3]:
        found = [accuracy[best(plan, rate, waiting).width] for waiting in queues]
        assert all(after <= before + 0.05 for before, after in pairwise(found)), rate
        assert found[-1] <= found[0]


@MACHINES
def test_the_more_arrive_the_more_is_earned_and_the_less_by_each(name: str) -> None:
    plan, accuracy, _ = machine_plan(name)
    gains = [gain(plan, rate) for rate in rates(plan)]
    each = [earned / rate for earned, rate in zip(gains, rates(plan), strict=True)]
    assert gains == sorted(gains)
    assert all(after < before + 1e-9 for before, after in pairwise(each))
    assert accuracy[-1] - 0.01 < each[0] <= accuracy[-1] + 1e-4


@MACHINES
def test_every_action_is_ranked_in_every_state_by_its_worth(name: str) -> None:
    plan, accuracy, queues = machine_plan(name)
    everything = {(int(width), int(batch)) for width, batch in plan.actions}
    assert len(everything) == len(plan.actions) == len(accuracy) * len({batch for _, batch in everything})
    for rate, waiting in product(rates(plan)[::6], queues):
        ranked = plan.ranked(rate, 1.0, waiting)
        assert {(action.width, action.batch) for action in ranked} == everything
        worth = [action.worth for action in ranked]
        assert worth == sorted(worth, reverse=True)


def test_a_dominated_cell_is_never_ranked_first() -> None:
    """The middle width is as accurate as the narrowest and slower; the widest is as fast as it at single images."""
    rows: Rows = [
        [(1, 0.010), (2, 0.012), (4, 0.016)],
        [(1, 0.020), (2, 0.024), (4, 0.032)],
        [(1, 0.020), (2, 0.040), (4, 0.080)],
    ]
    plan = make_plan(rows, [0.5, 0.5, 0.7], [0.05, 0.1, 0.2], 64)
    assert {best(plan, rate, waiting).width for rate in rates(plan) for waiting in range(1, 50)} == {0, 2}


def test_a_width_without_a_cell_is_no_action() -> None:
    plan = make_plan([(), [(1, 0.010)], ()], [0.5, 0.6, 0.7], [0.1], 64)
    assert plan.actions.tolist() == [[1, 1]]


def test_a_slow_machine_is_planned_for_as_if_it_had_been_measured_so() -> None:
    rows: Rows = [[(1, 0.010), (4, 0.020)], [(1, 0.020), (4, 0.060)]]
    slow: Rows = [[(batch, 1.5 * seconds) for batch, seconds in row] for row in rows]
    plan, slow_plan = (make_plan(each, [0.5, 0.7], [0.15], max_waiting=16) for each in (rows, slow))
    for rate, waiting in product((5, 30, 60, 120, 300), (1, 3, 8, 16)):
        ranked, expected = plan.ranked(rate, 1.5, waiting), slow_plan.ranked(rate, 1.0, waiting)
        assert [action[:2] for action in ranked] == [action[:2] for action in expected]
        assert [action.worth for action in ranked] == pytest.approx([action.worth for action in expected])


def test_what_passes_between_two_batches_counts_as_part_of_each() -> None:
    rows: Rows = [[(1, 0.010), (4, 0.020)]]
    longer: Rows = [[(1, 0.013), (4, 0.023)]]
    plan, expected = make_plan(rows, [0.7], [0.2], 16, overhead_s=0.003), make_plan(longer, [0.7], [0.2], 16)
    for rate, waiting in product((20, 80, 300), (1, 5, 16)):
        worth = [action.worth for action in expected.ranked(rate, 1.0, waiting)]
        assert [action.worth for action in plan.ranked(rate, 1.0, waiting)] == pytest.approx(worth)


# -- its parts


@pytest.mark.parametrize("mean", [1e-6, 0.01, 0.5, 1.0, 3.7, 12.0, 40.0, 1000.0])
def test_arrivals_have_exactly_their_mean(mean: float) -> None:
    """Or a surplus would make idle time look like an income."""
    counts, weights = _arrivals(np.array([[mean]]))
    assert weights.sum() == pytest.approx(1)
    assert (counts * weights).sum() == pytest.approx(mean, rel=1e-12)
    variance = float((weights * (counts - mean) ** 2).sum())
    assert variance == pytest.approx(mean, rel=0.12)


def test_few_arrivals_have_the_probabilities_of_poisson() -> None:
    counts, weights = _arrivals(np.array([2.0]))
    exact = [math.exp(-2.0) * 2.0**k / math.factorial(k) for k in range(8)]
    assert counts[0, :8].tolist() == pytest.approx(range(8), abs=0.02)
    assert weights[0, :8].tolist() == pytest.approx(exact, rel=0.03)


def test_the_same_inputs_make_the_same_plan() -> None:
    one, other = (plan_for(PROFILE, 50, 100, 200) for _ in range(2))
    assert (one.worth == other.worth).all()
    assert (one.order == other.order).all()


def test_a_plan_is_read_as_it_was_written() -> None:
    plan, file = plan_for(PROFILE, 50, 100), io.BytesIO()
    plan.write(file)
    file.seek(0)
    read = Plan.read(file)
    for rate, interference, waiting in ((0, 1.0, 1), (100, 1.7, 3), (1000, 9.0, 500)):
        assert read.ranked(rate, interference, waiting) == plan.ranked(rate, interference, waiting)


def test_what_is_no_plan_is_not_read() -> None:
    with pytest.raises(ValueError, match="pickle"):
        Plan.read(io.BytesIO(b"no plan"))
