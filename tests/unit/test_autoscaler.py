"""What Kubernetes' autoscaler makes of samples, step by step, worked out from its description."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from server.simulation.autoscaler import Autoscaler, Behaviour, Pod, Step, by_average, by_total

PENDING = Pod(None, counts=False)
SILENT = Pod(None)


def pods(*values: float) -> list[Pod]:
    return [Pod(value) for value in values]


@pytest.mark.parametrize(
    ("samples", "target", "wanted"),
    [
        (pods(1.5, 1.5), 0.75, 4),
        (pods(0.9, 0.9, 0.9), 0.3, 9),  # as a float, 0.9 / 0.3 is a little more than 3
        (pods(0.8, 0.8), 0.75, 2),  # 7 % above: tolerated
        (pods(0.825, 0.825), 0.75, 2),  # exactly a tenth above: tolerated
        (pods(0.826, 0.826), 0.75, 3),
        (pods(0.1, 0.1, 0.1, 0.1), 0.75, 1),
        (pods(0.0, 0.0), 0.75, 0),
        (pods(2.0, 0.0), 0.75, 3),  # only the average counts
    ],
)
def test_the_average_comes_to_the_target(samples: Sequence[Pod], target: float, wanted: int) -> None:
    assert by_average(len(samples), samples, target) == wanted


def test_who_has_no_sample_is_nothing_on_the_way_up_and_the_target_on_the_way_down() -> None:
    assert by_average(3, [*pods(1.5, 1.5), SILENT], 0.75) == 4, "an average of 1.0 over three"
    assert by_average(3, [*pods(0.15, 0.15), SILENT], 0.75) == 2, "of 0.35 over three"
    assert by_average(4, [*pods(0.9), SILENT, SILENT, SILENT], 0.75) == 4, "up became down: nothing changes"
    assert by_average(2, [SILENT, SILENT], 0.75) == 2
    assert by_average(0, [], 0.75) == 0


def test_who_is_not_ready_is_nothing_on_the_way_up_and_nobody_on_the_way_down() -> None:
    assert by_average(4, [*pods(1.5, 1.5), PENDING, PENDING], 0.75) == 4, "four are enough, once they run"
    assert by_average(4, [*pods(2.25, 2.25), PENDING, PENDING], 0.75) == 6
    assert by_average(4, [*pods(0.3, 0.3), PENDING, PENDING], 0.75) == 1, "0.8 of the two that are there"
    assert by_average(2, [Pod(0.9), Pod(0.9, counts=False)], 0.75) == 2, "a sample that is not to be trusted"
    assert by_average(5, [*pods(1.7), SILENT, PENDING], 0.75) == 5, "never fewer for too high a load"


@pytest.mark.parametrize("replicas", [2, 5, 10])
def test_one_sick_pod_asks_for_the_same_among_few_and_many(replicas: int) -> None:
    """A share that one of them has of 1, and the others of 0: 1 / 0.05."""
    assert by_average(replicas, pods(1.0, *[0.0] * (replicas - 1)), 0.05) == 20


def test_a_total_is_shared() -> None:
    assert by_total(2, 3.0, 0.75) == 4
    assert by_total(2, 1.6, 0.75) == 2, "tolerated"
    assert by_total(4, 0.8, 0.75) == 2
    assert by_total(0, 0.1, 0.75) == 1


# -- windows and steps


def syncs(scaler: Autoscaler, current: int, *recommended: int) -> list[int]:
    """The numbers of replicas after looks 15 s apart."""
    found = []
    for i, one in enumerate(recommended):
        current = scaler.sync(15.0 * (i + 1), current, [one])
        found.append(current)
    return found


def test_up_at_once_by_four_or_by_double() -> None:
    assert syncs(Autoscaler(Behaviour(most=100)), 1, 50, 50, 50, 50) == [5, 10, 20, 40]


def test_down_only_when_nothing_higher_was_recommended_for_five_minutes() -> None:
    numbers = syncs(Autoscaler(), 3, *[6], *[2] * 21)
    assert numbers[:20] == [6] * 20, "recommended at 15 s, and that counts until 300 s later"
    assert numbers[20:] == [2, 2]


def test_before_the_first_look_the_present_number_counts_as_recommended() -> None:
    assert syncs(Autoscaler(), 3, *[1] * 21) == [3] * 20 + [1]


def test_the_highest_of_the_last_minutes_is_where_it_goes_down_to() -> None:
    assert syncs(Autoscaler(), 8, *[8], *[5] * 10, *[2] * 11)[-2:] == [5, 5]


def test_a_window_on_the_way_up_waits_for_the_lowest() -> None:
    scaler = Autoscaler(Behaviour(up_window_s=31.0))
    assert syncs(scaler, 1, 4, 4, 4, 4, 3, 4, 4, 4)[:4] == [1, 1, 1, 4]


def test_least_and_most() -> None:
    assert syncs(Autoscaler(Behaviour(least=2, most=4)), 3, 9) == [4]
    assert syncs(Autoscaler(Behaviour(least=2, most=4, down_window_s=0)), 3, 0) == [2]


def test_steps_count_what_changed_within_their_period() -> None:
    slow = Behaviour(
        most=100, up=(Step(2, period_s=60),), down=(Step(50, is_percent=True, period_s=60),), down_window_s=0
    )
    assert syncs(Autoscaler(slow), 4, 50, 50, 50, 50, 50) == [6, 6, 6, 6, 8]
    assert syncs(Autoscaler(slow), 9, 1, 1, 1, 1, 1) == [4, 4, 4, 4, 2]
    assert syncs(Autoscaler(Behaviour(up=())), 4, 9) == [4]


def test_of_several_metrics_the_highest_counts_and_without_any_nothing_changes() -> None:
    assert Autoscaler().sync(15.0, 2, [1, 5, 3]) == 5
    assert Autoscaler().sync(15.0, 2, []) == 2
