"""The oracle against schedules worked out by hand, a linear-program solver, and every schedule of small traffic."""

from __future__ import annotations

import math
import random
from dataclasses import astuple
from itertools import combinations, pairwise

import numpy as np
import pytest
from scipy.optimize import linprog

from server.simulation.oracle import upper_bound

# One second for half the answers, three for 80 %: the first second gains 0.5, each of the next two 0.15.
COST_S, ACCURACY = [1.0, 3.0], [0.5, 0.8]


def bound(*windows: tuple[float, float]) -> tuple[float, float]:
    """Effective accuracy and busy seconds for images with these (arrival, deadline), at the two widths above."""
    arrivals_s, deadlines_s = zip(*windows, strict=True)
    return astuple(upper_bound(arrivals_s, deadlines_s, COST_S, ACCURACY, least_s=COST_S))


def approx(*numbers: float) -> object:
    return pytest.approx(numbers)


# -- by hand


def test_one_image_gets_the_best_width_that_its_budget_allows() -> None:
    assert bound((5, 8)) == approx(0.8, 3)
    assert bound((5, 7.9)) == approx(0.5, 1)
    assert bound((5, 5.9)) == bound((5, 5)) == bound((5, 4)) == (0, 0)


def test_two_images_share_what_time_there_is() -> None:
    """Three seconds: one for each at the narrow width, one for half of an upgrade."""
    assert bound((0, 3), (0, 3)) == approx((0.5 + 0.5 + 0.15) / 2, 3)


def test_in_overload_half_go_narrow() -> None:
    assert bound(*[(0, 8)] * 4) == approx((0.5 + 0.5 + 0.8 + 0.8) / 4, 8)


def test_beyond_the_narrowest_width_some_are_not_served() -> None:
    assert bound(*[(0, 2)] * 8) == approx(2 * 0.5 / 8, 2)


def test_the_impossible_count_as_arrivals() -> None:
    assert bound((0, 3), (0, 0.5), (9, 9.5), (7, 3)) == approx(0.8 / 4, 3)


def test_time_is_neither_saved_nor_borrowed() -> None:
    """Ten idle seconds help neither the two before nor the two after."""
    assert bound((0, 3), (0, 3), (13, 16), (13, 16)) == approx((1.15 + 1.15) / 4, 6)


def test_the_urgent_interrupt() -> None:
    assert bound((0, 6), (1, 4)) == approx(0.8, 6)
    assert bound((0, 5), (1, 4)) == approx((0.5 + 0.8 + 0.15) / 2, 5)


def test_who_can_wait_leaves_time_to_those_who_cannot() -> None:
    """9 s of work in 10: the first works when the second is done and before the third comes."""
    assert bound((0, 10), (0, 4), (6, 10)) == approx(0.8, 9)


def test_the_urgent_have_no_claim_to_more_accuracy() -> None:
    """The first second of the second image gains more than the other two of the first image."""
    assert bound((0, 3), (2, 3.5)) == approx((0.5 + 1.5 * 0.15 + 0.5) / 2, 3.5)


def test_a_batch_shares_its_time() -> None:
    """Three seconds alone, half a second each among six: a short budget forbids it though its share would fit."""
    widths = {"cost_s": [0.5], "accuracy": [0.8], "least_s": [3.0]}
    assert astuple(upper_bound([0] * 6, [3] * 6, **widths)) == approx(0.8, 3)
    assert astuple(upper_bound([0] * 12, [3] * 12, **widths)) == approx(0.4, 3)
    assert astuple(upper_bound([0] * 6, [2.9] * 6, **widths)) == (0, 0)


def test_a_width_below_the_line_between_others_changes_nothing() -> None:
    """At 2 s, a mix of the others reaches 0.65; and nobody wants the slowest."""
    cost_s = [2.0, 4.0, *COST_S]
    without = bound(*[(0, 8)] * 4)
    assert astuple(upper_bound([0] * 4, [8] * 4, cost_s, [0.65, 0.8, *ACCURACY], least_s=cost_s)) == approx(*without)
    assert astuple(upper_bound([0] * 4, [8] * 4, cost_s, [0.66, 0.8, *ACCURACY], least_s=cost_s)) == approx(0.66, 8)


def test_a_width_that_is_below_the_line_for_some_serves_those_who_have_no_time_for_a_better_one() -> None:
    cost_s = [1.0, 2.0, 3.0]
    assert astuple(upper_bound([0], [2.5], cost_s, [0.5, 0.6, 0.8], least_s=cost_s)) == approx(0.6, 2)


def test_a_budget_that_is_just_enough_is_enough() -> None:
    """Whatever the deadline was rounded to: a schedule adds up the same numbers."""
    chance = random.Random(0)
    for _ in range(1000):
        arrival_s, least_s = chance.uniform(0, 1000), chance.uniform(0.001, 0.1)
        one = upper_bound([arrival_s], [arrival_s + least_s], [0.001], [1.0], least_s=[least_s]).effective_accuracy
        assert one == pytest.approx(1)


# -- against others


def make_traffic(chance: random.Random, num_images: int) -> tuple[list[float], list[float]]:
    """Arrivals and deadlines; the images are close enough together to compete."""
    arrivals_s = [chance.uniform(0, 2 * num_images) for _ in range(num_images)]
    return arrivals_s, [at + chance.uniform(0, 8) for at in arrivals_s]


def solved(
    arrivals_s: list[float], deadlines_s: list[float], cost_s: list[float], accuracy: list[float], least_s: list[float]
) -> float:
    """The linear program as it reads: x, the share of image i at width w, and y, the seconds of i in interval k."""
    instants = sorted({*arrivals_s, *deadlines_s})
    lengths_s = np.diff(instants)
    N, X, K = len(arrivals_s), len(cost_s), len(lengths_s)
    share_limits = [
        (0, float(arrival + least <= deadline))
        for arrival, deadline in zip(arrivals_s, deadlines_s, strict=True)
        for least in least_s
    ]
    seconds_limits = [
        (0, None if arrival <= start and end <= deadline else 0)
        for arrival, deadline in zip(arrivals_s, deadlines_s, strict=True)
        for start, end in pairwise(instants)
    ]
    served_once = np.hstack([np.kron(np.eye(N), np.ones(X)), np.zeros((N, N * K))])
    one_device = np.hstack([np.zeros((K, N * X)), np.kron(np.ones(N), np.eye(K))])
    paid = np.hstack([np.kron(np.eye(N), cost_s), -np.kron(np.eye(N), np.ones(K))])
    result = linprog(
        -np.concatenate([np.tile(accuracy, N), np.zeros(N * K)]),
        np.vstack([served_once, one_device]),
        np.concatenate([np.ones(N), lengths_s]),
        paid,
        np.zeros(N),
        share_limits + seconds_limits,
        method="highs",
    )
    assert result.status == 0
    return -float(result.fun) / N


def test_it_is_the_optimum_of_the_linear_program() -> None:
    chance = random.Random(1)
    for case in range(60):
        arrivals_s, deadlines_s = make_traffic(chance, chance.randint(1, 9))
        num_widths = chance.randint(1, 5)
        cost_s = [chance.uniform(0.2, 4) for _ in range(num_widths)]
        least_s = [cost * chance.choice((1, chance.uniform(1, 3))) for cost in cost_s]
        accuracy = [chance.choice((0.0, 1.0, chance.random(), chance.random())) for _ in cost_s]
        expected = solved(arrivals_s, deadlines_s, cost_s, accuracy, least_s)
        found = upper_bound(arrivals_s, deadlines_s, cost_s, accuracy, least_s=least_s)
        assert found.effective_accuracy == pytest.approx(expected, abs=1e-9), case


def best_schedule(
    windows: frozenset[tuple[float, float]], seconds: dict[tuple[float, int], float], now: float = 0.0
) -> float:
    """The most right answers of any sequence of batches, nothing interrupted; ``seconds`` of (accuracy, batch)."""
    most = 0.0
    for (accuracy, size), batch_s in seconds.items():
        for batch in combinations(windows, size):
            end = max(now, *(arrival for arrival, _ in batch)) + batch_s
            if end <= min(deadline for _, deadline in batch):
                most = max(most, size * accuracy + best_schedule(windows - {*batch}, seconds, end))
    return most


def test_no_schedule_exceeds_it() -> None:
    chance, reached = random.Random(2), 0
    for case in range(60):
        arrivals_s, deadlines_s = make_traffic(chance, chance.randint(1, 4))
        accuracy = [0.5, 0.7]
        alone_s = [chance.uniform(0.5, 2), chance.uniform(2, 4)]
        pair_s = [alone * chance.uniform(1, 2) for alone in alone_s]
        seconds = {
            (a, size): s for size, both in ((1, alone_s), (2, pair_s)) for a, s in zip(accuracy, both, strict=True)
        }
        best = best_schedule(frozenset(zip(arrivals_s, deadlines_s, strict=True)), seconds) / len(arrivals_s)
        found = upper_bound(arrivals_s, deadlines_s, [s / 2 for s in pair_s], accuracy, least_s=alone_s)
        assert found.effective_accuracy >= best - 1e-12, case
        reached += math.isclose(found.effective_accuracy, best)
    assert reached > 10, "where images do not compete, the bound is what a schedule reaches"


# -- whatever the traffic


def test_a_faster_device_is_never_worse() -> None:
    chance = random.Random(3)
    arrivals_s, deadlines_s = make_traffic(chance, 200)
    cost_s, accuracy = np.array([0.5, 1, 2, 4]), [0.4, 0.6, 0.7, 0.75]
    bounds = [
        upper_bound(arrivals_s, deadlines_s, slowness * cost_s, accuracy, least_s=slowness * cost_s).effective_accuracy
        for slowness in (1e-6, 0.1, 0.5, 0.9, 1, 1.1, 2, 5, 20)
    ]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] == pytest.approx(0.75)
    assert bounds[-1] == 0


def test_the_unit_of_time_and_the_order_of_what_is_told_do_not_matter() -> None:
    chance = random.Random(4)
    arrivals_s, deadlines_s = map(np.array, make_traffic(chance, 50))
    cost_s, accuracy = np.array([0.5, 1, 2, 4]), np.array([0.4, 0.6, 0.7, 0.75])
    found = upper_bound(arrivals_s, deadlines_s, cost_s, accuracy, least_s=1.5 * cost_s)
    ms = upper_bound(1000 * arrivals_s, 1000 * deadlines_s, 1000 * cost_s, accuracy, least_s=1500 * cost_s)
    assert astuple(ms) == approx(found.effective_accuracy, 1000 * found.busy_s)
    images, widths = np.array(chance.sample(range(50), 50)), np.array([2, 0, 3, 1])
    cost_s, accuracy = cost_s[widths], accuracy[widths]
    mixed = upper_bound(arrivals_s[images], deadlines_s[images], cost_s, accuracy, least_s=1.5 * cost_s)
    assert astuple(mixed) == approx(found.effective_accuracy, found.busy_s)


# -- what is refused


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"deadlines_s": [1.0]}, r"arrivals_s \(2,\), deadlines_s \(1,\): give one row each"),
        ({"arrivals_s": [], "deadlines_s": []}, r"arrivals_s \(0,\).* not empty"),
        ({"cost_s": [], "accuracy": [], "least_s": []}, r"cost_s \(0,\).* not empty"),
        ({"accuracy": [[0.5, 0.8]]}, r"accuracy \(1, 2\).*give one row each"),
        ({"deadlines_s": [1.0, math.nan]}, "deadlines_s holds nan: give finite numbers"),
        ({"accuracy": [0.5, 80]}, "an accuracy of 80: give a share from 0 to 1"),
        ({"cost_s": [0.0, 3.0]}, "takes 0 s of a batch that takes 1 s: give a cost above 0"),
        ({"cost_s": [1.0, 3.5]}, "takes 3.5 s of a batch that takes 3 s: .*at most the least latency"),
    ],
)
def test_what_describes_nothing_is_refused(wrong: dict[str, list[float]], told: str) -> None:
    right = {"arrivals_s": [0.0, 1.0], "deadlines_s": [5.0, 6.0], "cost_s": COST_S, "accuracy": ACCURACY}
    with pytest.raises(ValueError, match=told):
        upper_bound(**({**right, "least_s": COST_S} | wrong))
