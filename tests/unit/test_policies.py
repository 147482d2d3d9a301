"""The adaptive policy in situations worked out by hand, on the profile of ``situations.py``."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.policies import Policy, fixed_width, policy_of
from server.policies.adaptive import Adaptive, sort_out
from server.policies.deadlines import admissible, fits, in_time, sizes_for
from server.policies.slackfit import slackfit
from server.policies.threshold import Threshold
from server.types import Decision, Load, QueueView
from tests.unit.situations import (
    ALL,
    IDLE,
    MEASURED,
    MIDDLE,
    NARROW,
    PROFILE,
    WIDE,
    Image,
    due,
    make_profile,
    plan_for,
    plan_that_ranks,
    queue_of,
)

BUSY = Load(arrival_rate=500.0)  # the narrowest width serves 250 a second
ACCURACY_FIRST = [(width, size, 0.01 * (4 * width + size)) for width in (2, 1, 0) for size in (4, 2, 1)]
NOBODY: list[int] = []


@cache
def planned() -> Adaptive:
    """With a plan for budgets of a second."""
    return Adaptive(plan_for(PROFILE, 1000))


def decide(*groups: Sequence[Image], load: Load = IDLE, profile: LatencyProfile = PROFILE) -> Decision:
    return planned()(queue_of(*groups), load, profile, 0.0)


def follow(
    ranking: Sequence[tuple[int, int, float]], *groups: Sequence[Image], profile: LatencyProfile = PROFILE
) -> Decision:
    """What is decided by a plan of this ranking: (index of the width, images, worth)."""
    return Adaptive(plan_that_ranks(*ranking))(queue_of(*groups), IDLE, profile, 0.0)


def chosen(decision: Decision) -> tuple[Width, list[int], list[int]]:
    return decision.width, list(decision.batch), list(decision.shed)


# -- one image, nobody else


def test_an_idle_server_with_time_spends_it_on_accuracy() -> None:
    decision = decide(due(1000))
    assert chosen(decision) == (WIDE, [0], NOBODY)
    assert decision.predicted_s == pytest.approx(0.040)
    assert decision.reason == "adaptive"


@pytest.mark.parametrize(
    ("budget_ms", "width"), [(40.1, WIDE), (39.9, MIDDLE), (20.1, MIDDLE), (19.9, NARROW), (10.1, NARROW)]
)
def test_a_tighter_budget_buys_a_narrower_width(budget_ms: float, width: Width) -> None:
    assert chosen(decide(due(budget_ms))) == (width, [0], NOBODY)


def test_an_image_that_is_late_at_every_width_is_shed() -> None:
    decision = decide(due(9.9))
    assert (list(decision.batch), list(decision.shed)) == (NOBODY, [0])


def test_an_image_that_may_be_in_time_is_run_though_its_p99_is_late() -> None:
    careful = make_profile(samples=1)  # p50 is 10 ms, p99 is 15 ms
    decision = decide(due(11), profile=careful)
    assert chosen(decision) == (NARROW, [0], NOBODY)
    assert decision.reason == "hurried"
    assert decision.predicted_s == pytest.approx(0.015)
    assert list(decide(due(9.9), profile=careful).shed) == [0]


def test_a_width_is_chosen_by_its_p99() -> None:
    careful = make_profile(samples=1)
    widths = [decide(due(ms), profile=careful).width for ms in (60.1, 59.9, 30.1, 29.9)]
    assert widths == [WIDE, MIDDLE, MIDDLE, NARROW]


# -- load


def test_the_width_follows_the_arrival_rate_down_and_up_again() -> None:
    """At full width the device serves 62 images a second, at the middle one 125, at the narrowest 250."""
    for rate, width in ((0, WIDE), (40, WIDE), (200, MIDDLE), (500, NARROW), (9999, NARROW), (200, MIDDLE), (0, WIDE)):
        assert decide(due(1000, 2), load=Load(arrival_rate=rate)).width == width, rate


def test_a_faster_stream_never_gets_a_wider_width() -> None:
    widths = [decide(due(1000, 2), load=Load(arrival_rate=rate)).width for rate in range(0, 600, 5)]
    assert widths == sorted(widths, reverse=True)
    assert set(widths) == set(ALL)


def test_more_waiting_images_never_get_a_wider_width() -> None:
    widths = [decide(due(200, count)).width for count in range(1, 60)]
    assert widths == sorted(widths, reverse=True)
    assert set(widths) == set(ALL)


@pytest.mark.parametrize(
    ("factor", "width"), [(1.0, WIDE), (1.1, WIDE), (1.2, MIDDLE), (2.2, MIDDLE), (2.3, NARROW), (4.4, NARROW)]
)
def test_interference_makes_everything_take_longer(factor: float, width: Width) -> None:
    decision = decide(due(45), load=Load(interference=factor))
    assert chosen(decision) == (width, [0], NOBODY)
    assert decision.predicted_s == pytest.approx(0.040 * float(width) * factor)


def test_interference_sheds_what_it_makes_late() -> None:
    assert list(decide(due(45), load=Load(interference=4.6)).shed) == [0]


def test_interference_leaves_less_of_the_device_to_arrivals() -> None:
    assert decide(due(1000, 2), load=Load(arrival_rate=100)).width == WIDE
    assert decide(due(1000, 2), load=Load(arrival_rate=100, interference=1.5)).width == MIDDLE


@pytest.mark.parametrize("delay", ["hop_s", "respond_s"])
def test_time_before_and_after_the_engine_counts(delay: str) -> None:
    assert decide(due(45), load=replace(IDLE, **{delay: 0.0049})).width == WIDE
    assert decide(due(45), load=replace(IDLE, **{delay: 0.0051})).width == MIDDLE


@pytest.mark.parametrize("delay", ["hop_s", "respond_s"])
def test_a_batch_leaves_its_head_the_time_around_the_engine(delay: str) -> None:
    """Two images take 12 ms. Together with 5 ms more the first would be late; alone it is in time."""
    assert list(decide(due(16), due(100)).batch) == [0, 1]
    assert chosen(decide(due(16), due(100), load=replace(IDLE, **{delay: 0.005}))) == (NARROW, [0], NOBODY)


@pytest.mark.parametrize("delay", ["hop_s", "respond_s"])
def test_an_image_that_the_time_around_the_engine_makes_late_is_shed(delay: str) -> None:
    assert list(decide(due(12), load=replace(IDLE, **{delay: 0.001})).batch) == [0]
    assert list(decide(due(12), load=replace(IDLE, **{delay: 0.003})).shed) == [0]


# -- the ranking is followed as far as nobody is late


def test_the_best_action_that_makes_nobody_late_is_taken() -> None:
    assert chosen(follow(ACCURACY_FIRST, due(64.1, 4))) == (WIDE, [0, 1, 2, 3], NOBODY)
    assert chosen(follow(ACCURACY_FIRST, due(63.9, 4))) == (WIDE, [0, 1], NOBODY)  # 48 ms, and 12 for the others
    assert chosen(follow(ACCURACY_FIRST, due(59.9, 4))) == (WIDE, [0], NOBODY)  # 40 ms, and 16
    assert chosen(follow(ACCURACY_FIRST, due(55.9, 4))) == (MIDDLE, [0, 1, 2, 3], NOBODY)  # 32 ms
    assert chosen(follow(ACCURACY_FIRST, due(31.9, 4))) == (NARROW, [0, 1, 2, 3], NOBODY)  # 24 + 12, 20 + 16: too long


def test_what_waits_behind_is_counted_at_the_fastest_width() -> None:
    """Four at full width take 64 ms, and four more 16 at the narrowest."""
    assert chosen(follow(ACCURACY_FIRST, due(80.1, 8))) == (WIDE, [0, 1, 2, 3], NOBODY)
    assert chosen(follow(ACCURACY_FIRST, due(79.9, 8))) == (WIDE, [0, 1], NOBODY)  # 48 + 16 + 12
    assert chosen(follow(ACCURACY_FIRST, due(75.9, 8))) == (WIDE, [0], NOBODY)  # 40 + 16 + 16
    assert chosen(follow(ACCURACY_FIRST, due(71.9, 8))) == (MIDDLE, [0, 1, 2, 3], NOBODY)  # 32 + 16
    assert chosen(follow(ACCURACY_FIRST, due(41), due(49.9))) == (MIDDLE, [0, 1], NOBODY)  # 40 + 10: too long


def test_a_wider_width_leaves_those_behind_a_margin_for_slow_batches() -> None:
    """Where a batch may take half as long again, its p99 is waited for, and 5 to 8 ms are spared for the others."""
    careful = make_profile(samples=1)
    assert follow(ACCURACY_FIRST, due(60.1), due(75.9), profile=careful).width == MIDDLE  # 60 + 6 + 10 > 75.9
    assert chosen(follow(ACCURACY_FIRST, due(60.1), due(76.1), profile=careful)) == (WIDE, [0], NOBODY)


def test_when_time_is_short_the_largest_batch_runs() -> None:
    """The plan may rank single images of the fastest width first: four at once cost each of them less."""
    narrow_first = [(0, 1, 0.9), (0, 2, 0.8), (0, 4, 0.7)]
    assert chosen(follow(narrow_first, due(1000, 3))) == (NARROW, [0, 1, 2], NOBODY)
    assert chosen(follow(narrow_first, due(11), due(1000, 3))) == (NARROW, [0], NOBODY), "the head cannot wait for them"
    wide_first = [(2, 1, 0.9), *narrow_first]
    assert chosen(follow(wide_first, due(1000, 3))) == (WIDE, [0], NOBODY), "elsewhere the plan knows best"


def test_the_most_urgent_are_given_up_where_others_are_worth_more() -> None:
    """To run the head in time would cost the four behind it theirs; an answer is worth 0.5 at least."""
    ranking = [(0, 4, 2.5), (0, 2, 1.5), (0, 1, 0.9)]
    queue = (due(11), due(17, 4))
    decision = follow(ranking, *queue)
    assert chosen(decision) == (NARROW, [1, 2, 3, 4], NOBODY)
    assert decision.predicted_s == pytest.approx(0.016)
    assert chosen(follow(ranking, due(16.1), due(17, 4)))[1] == [0, 1, 2, 3], (
        "nobody need be given up, and the fifth ..."
    )


def test_an_image_is_not_given_up_for_less_than_its_answer() -> None:
    assert chosen(follow([(0, 4, 0.9), (0, 1, 0.5)], due(11), due(1000, 3)))[1] == [0]
    assert chosen(follow([(0, 4, 1.1), (0, 1, 0.5)], due(11), due(1000, 3)))[1] == [1, 2, 3]


def test_of_a_mixed_queue_no_more_are_given_up_than_a_third_of_whom_that_saves() -> None:
    """A plan knows nothing of kinds, so that none of its other actions may be left."""
    pinned = due(600_000, widths=(NARROW,))
    decision = follow([(0, 4, 0.9)], due(15, 2), due(100, 4), pinned)
    assert (chosen(decision), decision.reason) == ((NARROW, [0, 1], NOBODY), "hurried")
    assert chosen(follow([(0, 4, 0.9)], due(15), due(100, 4), pinned)) == (NARROW, [1, 2, 3, 4], NOBODY)


def test_nobody_is_given_up_for_others_accuracy() -> None:
    """Four at full width would take 64 ms; the first has 50, in which he can be served."""
    assert chosen(follow([(2, 4, 9.0), (1, 1, 0.5)], due(50), due(1000, 4))) == (MIDDLE, [0], NOBODY)


def test_where_somebody_will_be_late_the_batch_that_saves_the_most_a_second_runs() -> None:
    decision = decide(due(17, 50))
    assert (chosen(decision), decision.reason) == ((NARROW, [0, 1, 2, 3], NOBODY), "hurried")
    alone = decide(due(11), due(11.5))
    assert (chosen(alone), alone.reason) == ((NARROW, [0], NOBODY), "hurried"), "two take 12 ms"


def test_who_was_let_in_counts_for_three_in_a_hurry() -> None:
    """Four in 16 ms instead of one in 10 are more a second, but not if one has to be given up for them."""
    assert chosen(decide(due(11), due(17, 12))) == (NARROW, [0], NOBODY)


def test_without_a_plan_the_fastest_width_serves() -> None:
    decision = Adaptive()(queue_of(due(1000, 6)), IDLE, PROFILE, 0.0)
    assert (chosen(decision), decision.reason) == ((NARROW, [0, 1, 2, 3], NOBODY), "hurried")


# -- who is in the batch


def test_nobody_is_late_who_could_be_in_time() -> None:
    assert list(decide(due(12.1), due(1000)).batch) == [0, 1]  # two take 12 ms
    assert chosen(decide(due(11.9), due(1000))) == (NARROW, [0], NOBODY)


def test_only_the_hopeless_are_shed() -> None:
    decision = decide(due(5, 2), due(9), due(100), due(1000))
    assert (list(decision.batch), list(decision.shed)) == ([3, 4], [0, 1, 2])


def test_a_batch_is_at_most_the_largest_on_offer() -> None:
    assert list(decide(due(1000, 9)).batch) == [0, 1, 2, 3]


def test_a_batch_of_any_size_between_the_profiled_ones() -> None:
    """Three take as long as four at full width, 64 ms."""
    decision = decide(due(64.1, 3))
    assert chosen(decision) == (WIDE, [0, 1, 2], NOBODY)
    assert decision.predicted_s == pytest.approx(0.064)


def test_while_only_single_images_are_warmed_batches_are_single() -> None:
    profile = LatencyProfile(MEASURED, 4)
    profile.record(NARROW, 1, [0.010])
    profile.record(WIDE, 1, [0.040])
    assert list(decide(due(1000, 3), profile=profile).batch) == [0]


# -- pins and floors


def test_a_batch_has_one_width_and_who_does_not_allow_it_waits() -> None:
    queue = [due(1000), due(1000, widths=(WIDE,)), due(1000, widths=(MIDDLE, WIDE)), due(1000)]
    assert chosen(decide(*queue)) == (WIDE, [0, 1, 2, 3], NOBODY)
    assert chosen(decide(*queue, load=Load(arrival_rate=200))) == (MIDDLE, [0, 2, 3], NOBODY)
    assert chosen(decide(*queue, load=BUSY)) == (NARROW, [0, 3], NOBODY)
    assert chosen(decide(queue[1], load=BUSY)) == (WIDE, [0], NOBODY)


@pytest.mark.parametrize("widths", [(WIDE,), (MIDDLE,), (MIDDLE, WIDE)])
def test_a_head_that_no_other_shares_its_width_with_does_not_starve(widths: tuple[Width, ...]) -> None:
    crowd = due(1000, 10, widths=(NARROW,))
    assert chosen(decide(due(900, widths=widths), crowd, load=BUSY)) == (widths[0], [0], NOBODY)


def test_nobody_loses_accuracy_by_joining_a_narrower_batch() -> None:
    queue = [due(900, widths=(NARROW,)), due(1000), due(1000, widths=(NARROW,))]
    assert chosen(decide(*queue)) == (NARROW, [0, 2], NOBODY)
    assert decide(queue[1]).width == WIDE
    assert chosen(decide(*queue, load=BUSY)) == (NARROW, [0, 1, 2], NOBODY), "where all are narrow anyway"


def test_a_floor_holds_under_any_load() -> None:
    floor = due(1000, 2, widths=(MIDDLE, WIDE))
    assert [decide(floor, load=Load(arrival_rate=rate)).width for rate in (0, 60, 500)] == [WIDE, WIDE, MIDDLE]
    assert list(decide(due(15, widths=(MIDDLE, WIDE))).shed) == [0], "not served below its floor"


def test_an_image_that_forbids_the_fast_widths_is_counted_at_one_that_it_allows() -> None:
    """The second one will take 40 ms: at the middle width the first leaves it 59 of its 79, at full width 39."""
    assert decide(due(48.1), due(79, widths=(WIDE,))).width == WIDE  # both together
    assert decide(due(45), due(79, widths=(WIDE,))).width == MIDDLE
    assert decide(due(45), due(81, widths=(WIDE,))).width == WIDE


def test_whoever_may_not_join_is_passed_over() -> None:
    queue = [due(900), due(950, widths=(WIDE,)), due(1000, 5)]
    assert chosen(decide(*queue, load=BUSY)) == (NARROW, [0, 2, 3, 4], NOBODY)


def test_whoever_is_passed_over_must_still_be_in_time() -> None:
    """Two at full width take 48 ms, one takes 40; then the pinned one has until 51, and will take 10."""
    queue = due(50), due(51, widths=(NARROW,)), due(1000)
    assert chosen(follow([(2, 2, 0.9), (2, 1, 0.8)], *queue)) == (WIDE, [0], NOBODY)


def test_images_with_equal_widths_are_alike_though_the_tuples_are_different_objects() -> None:
    queue = queue_of(due(900), due(950, widths=(WIDE,)), due(1000, 5))
    copies = QueueView(queue.due, [(*widths,) for widths in queue.widths], queue.kinds)
    assert chosen(planned()(copies, BUSY, PROFILE, 0.0)) == chosen(planned()(queue, BUSY, PROFILE, 0.0))


def test_of_a_mixed_queue_each_is_late_by_his_own_widths() -> None:
    queue = queue_of(due(9), due(15, widths=(WIDE,)), due(15), due(39, widths=(WIDE,)), due(41, widths=(WIDE,)))
    alive, shed = sort_out(queue, IDLE, PROFILE, 0.0)
    assert (list(alive), list(shed)) == ([2, 4], [0, 1, 3])


# -- widths that are not worth it, or went off the offer


def test_a_dominated_width_is_never_chosen() -> None:
    """The middle one is slower than the narrowest and as accurate."""
    profile = LatencyProfile({NARROW: 0.5, MIDDLE: 0.5, WIDE: 0.7}, 4)
    for width in ALL:
        for batch, ms in ((1, 40), (2, 48), (4, 64)):
            profile.record(width, batch, [float(width) * ms / 1000] * 20)
    policy = Adaptive(plan_for(profile, 100))
    queues = [queue_of(due(ms, count)) for ms in range(10, 200, 7) for count in (1, 3, 9)]
    loads = [Load(arrival_rate=rate) for rate in (0, 60, 300)]
    decisions = [policy(queue, load, profile, 0.0) for queue in queues for load in loads]
    assert {decision.width for decision in decisions if decision.batch} == {NARROW, WIDE}


def test_nobody_runs_narrow_alone_where_that_saves_no_time() -> None:
    """A GPU: one image takes 10 ms at every width, and further ones the more the wider it is."""
    profile = LatencyProfile(MEASURED, 4)
    for width in ALL:
        for batch, more_ms in ((1, 0.0), (2, 4.0), (4, 14.0)):
            profile.record(width, batch, [(10 + float(width) * more_ms) / 1000] * 20)
    policy = Adaptive(plan_for(profile, 100))
    for rate in (0, 60, 500):
        assert {policy(queue_of(due(ms)), Load(rate), profile, 0.0).width for ms in range(11, 60)} == {WIDE}
    assert policy(queue_of(due(14.1, 2)), IDLE, profile, 0.0).width == WIDE
    assert policy(queue_of(due(13.9, 2)), IDLE, profile, 0.0).width == MIDDLE  # 12 ms
    assert policy(queue_of(due(14, 4)), IDLE, profile, 0.0).width == NARROW  # 13.5 ms; 17 at the middle one


def small_batches_profile(wide_alone_ms: Sequence[float] = (2.0,) * 20, samples: int = 20) -> LatencyProfile:
    """The narrowest width takes 2.1, 2.2 and 2.4 ms for 1, 2 and 4 images, the widest 2.0, 2.1 and 8."""
    profile = LatencyProfile({NARROW: 0.5, WIDE: 0.7}, 4)
    profile.record(WIDE, 1, [ms / 1000 for ms in wide_alone_ms][:samples])
    for width, batch, ms in ((NARROW, 1, 2.1), (NARROW, 2, 2.2), (NARROW, 4, 2.4), (WIDE, 2, 2.1), (WIDE, 4, 8.0)):
        profile.record(width, batch, [ms / 1000] * samples)
    return profile


@pytest.mark.parametrize(("count", "width"), [(1, WIDE), (2, WIDE), (3, NARROW), (4, NARROW)])
def test_no_width_is_chosen_for_speed_at_a_batch_for_which_it_is_dominated(count: int, width: Width) -> None:
    profile, everybody = small_batches_profile(), list(range(count))
    both = profile.widths
    assert profile.fastest == NARROW
    decision = Adaptive()(queue_of(due(1000, count, widths=both)), IDLE, profile, 0.0)
    assert (chosen(decision), decision.reason) == ((width, everybody, NOBODY), "hurried")
    assert decision.predicted_s == profile.p99(width, count)
    decision = follow([(0, 1, 0.9), (1, 1, 0.8)], due(1000, count, widths=both), profile=profile)
    assert (chosen(decision), decision.reason) == ((width, everybody, NOBODY), "adaptive"), "the larger batch"


def test_a_dominated_width_is_kept_where_the_better_one_is_not_for_all_or_not_always_faster() -> None:
    profile = small_batches_profile()
    both = profile.widths
    pinned = due(1000, widths=both), due(1001, widths=(NARROW,))
    assert chosen(Adaptive()(queue_of(*pinned), IDLE, profile, 0.0)) == (NARROW, [0, 1], NOBODY)
    floor = due(1000, widths=both), due(1001, widths=(WIDE,))
    assert chosen(Adaptive()(queue_of(*floor), IDLE, profile, 0.0)) == (WIDE, [0], NOBODY)
    unsteady = small_batches_profile([2.0] * 18 + [9.0] * 2)
    assert unsteady.dominated_at(1) == {NARROW}
    assert chosen(Adaptive()(queue_of(due(1000, widths=both)), IDLE, unsteady, 0.0)) == (NARROW, [0], NOBODY)


@pytest.mark.parametrize("policy", [Adaptive(), slackfit], ids=["adaptive", "slackfit"])
def test_an_image_that_one_width_alone_can_save_is_run_there(policy: Policy) -> None:
    """At the median: half as much longer may happen. Batches are faster at the other width."""
    for samples in (1, 20):
        profile = small_batches_profile(samples=samples)
        decision = policy(queue_of(due(2.05, widths=profile.widths)), IDLE, profile, 0.0)
        assert chosen(decision) == (WIDE, [0], NOBODY)
        assert list(policy(queue_of(due(1.95, widths=profile.widths)), IDLE, profile, 0.0).shed) == [0]


def test_whoever_pins_a_dominated_width_gets_it() -> None:
    profile = LatencyProfile({NARROW: 0.5, MIDDLE: 0.5}, 1)
    profile.record(NARROW, 1, [0.010])
    profile.record(MIDDLE, 1, [0.020])
    assert profile.dominated_at(1) == {MIDDLE}
    assert Adaptive(plan_for(profile, 100))(queue_of(due(1000, widths=(MIDDLE,))), IDLE, profile, 0.0).width == MIDDLE


def test_a_width_that_is_not_warmed_is_never_chosen() -> None:
    profile = make_profile(widths=(NARROW, WIDE))
    assert {decide(due(ms), profile=profile).width for ms in range(11, 100)} == {NARROW, WIDE}


def test_a_cell_that_was_withdrawn_is_never_chosen_though_the_plan_still_ranks_it() -> None:
    profile = make_profile()
    profile.withdraw(WIDE, 2)
    assert chosen(decide(due(1000, 4), profile=profile)) == (WIDE, [0], NOBODY)
    profile.withdraw(WIDE, 1)
    assert decide(due(1000, 4), profile=profile).width == MIDDLE


def test_who_allows_no_width_on_offer_any_more_is_shed() -> None:
    profile = make_profile()
    profile.withdraw(WIDE, 1)
    decision = decide(due(900, widths=(WIDE,)), due(1000, 2), profile=profile)
    assert (decision.width, list(decision.shed)) == (MIDDLE, [0])
    for width in (NARROW, MIDDLE):
        profile.withdraw(width, 1)
    assert list(decide(due(1000, 2), profile=profile).shed) == [0, 1]


# -- policies by name


def test_policies_by_name() -> None:
    assert isinstance(policy_of("adaptive"), Adaptive)
    assert isinstance(policy_of("fixed:0.5"), Adaptive)
    assert policy_of("slackfit") is slackfit
    assert isinstance(policy_of("threshold"), Threshold)
    with pytest.raises(ValueError, match="'fastest' does not exist; there are adaptive, fixed:<width>"):
        policy_of("fastest")


def test_a_fixed_width_by_name() -> None:
    assert fixed_width("fixed:0.5", ALL) == fixed_width("fixed:.50", ALL) == MIDDLE
    assert fixed_width("adaptive", ALL) is None
    for unknown in ("fixed:0.3", "fixed:", "fixed:wide", "fixed:-1"):
        with pytest.raises(ValueError, match=r"trained widths: 0\.25, 0\.5, 1$"):
            fixed_width(unknown, ALL)


# -- whatever the queue


def make_queue(chance: random.Random) -> QueueView:
    allowed = chance.choice(([ALL], [ALL, ALL, ALL, (MIDDLE, WIDE), (NARROW,), (WIDE,)]))
    return queue_of(
        *(
            due(1000 * chance.choice((chance.uniform(-0.1, 0.1), chance.uniform(0, 2))), widths=chance.choice(allowed))
            for _ in range(chance.randint(1, 30))
        )
    )


def make_load(chance: random.Random) -> Load:
    return Load(
        arrival_rate=chance.choice((0.0, chance.uniform(0, 500))),
        interference=chance.choice((1.0, chance.uniform(1, 10))),
        hop_s=chance.choice((0.0, chance.uniform(0, 0.02))),
        respond_s=chance.choice((0.0, chance.uniform(0, 0.02))),
    )


POLICIES: list[Policy] = [lambda *situation: planned()(*situation), Adaptive(), slackfit, Threshold()]


@pytest.mark.parametrize("policy", POLICIES, ids=["adaptive", "without a plan", "slackfit", "threshold"])
def test_every_decision_is_sound(policy: Policy) -> None:
    """Positions are of the queue and distinct, the batch is on offer, and everybody in it allows its width."""
    chance = random.Random(0)
    for case in range(300):
        queue, load = make_queue(chance), make_load(chance)
        decision = policy(queue, load, PROFILE, 0.0)
        batch, shed, everybody = list(decision.batch), list(decision.shed), set(range(len(queue.due)))
        assert batch or set(shed) == everybody, case
        assert len(batch) <= PROFILE.max_batch(decision.width)
        assert len({*batch, *shed}) == len(batch) + len(shed)
        assert {*batch, *shed} <= everybody
        assert batch == sorted(batch)
        assert all(decision.width in queue.widths[i] for i in batch)
        if batch:
            p99_s = load.interference * PROFILE.p99(decision.width, len(batch))
            assert decision.predicted_s == pytest.approx(p99_s)
        soonest_s = load.hop_s + load.respond_s
        lost = {
            i for i in everybody if queue.due[i] < soonest_s + load.interference * PROFILE.p50(queue.widths[i][0], 1)
        }
        assert set(shed) == lost, "nobody else"


def test_everyone_in_the_batch_is_in_time_at_p99_unless_it_is_hurried() -> None:
    chance, seen = random.Random(1), Counter[str]()
    for profile in (PROFILE, make_profile(samples=1)):
        for _ in range(300):
            queue, load = make_queue(chance), make_load(chance)
            decision = planned()(queue, load, profile, 0.0)
            seen[decision.reason] += 1
            if decision.reason == "adaptive":
                finish = load.hop_s + decision.predicted_s + load.respond_s
                assert all(finish <= queue.due[i] for i in decision.batch)
    assert min(seen["adaptive"], seen["hurried"]) > 30


def admitted(chance: random.Random, load: Load, profile: LatencyProfile) -> list[float]:
    """Deadlines that can all be met, in the median, by a device that is free now."""
    instants = list[float]()
    for _ in range(chance.randint(1, 25)):
        newcomer = chance.uniform(0, 0.4)
        queue = queue_of(*(due(1000 * instant) for instant in instants))
        if fits(queue, newcomer, ALL, load.hop_s + load.respond_s, load, profile):
            instants = sorted([*instants, newcomer])
    return instants


def test_a_feasible_queue_is_never_made_infeasible() -> None:
    """Followed to its end, on a device that takes its median: whatever width is spent on the first ones, all behind
    them can still be served. (Unless somebody is given up for others, which leaves the queue's first behind.)"""
    chance, widths = random.Random(2), Counter[Width]()
    for profile in [PROFILE, make_profile(samples=1)] * 60:
        load, now = replace(make_load(chance), interference=chance.choice((1.0, 1.5))), 0.0
        instants, sizes = admitted(chance, load, profile), sizes_for(ALL, load, profile)
        while instants:
            decision = planned()(queue_of(*(due(1000 * instant) for instant in instants)), load, profile, now)
            gone = {*decision.batch, *decision.shed}
            left = [instant for i, instant in enumerate(instants) if i not in gone]
            now += load.hop_s + load.interference * profile.p50(decision.width, max(1, len(decision.batch)))
            if decision.reason == "adaptive" and gone == set(range(len(gone))):
                assert in_time(left, 0, now + load.respond_s, sizes)
                widths[decision.width] += 1
            instants = left
    assert min(widths[width] for width in ALL) > 20


def served(kinds: Sequence[tuple[Width, ...]], chance: random.Random, profile: LatencyProfile) -> tuple[int, int]:
    """How many of 40 images that come at once are let in, and how many of those are answered in time, by a device that
    takes its median."""
    images = list[Image]()
    for _ in range(40):
        instant, widths = chance.choice((chance.uniform(0, 0.3), 600)), chance.choice(kinds)
        if admissible(instant, widths, queue_of(images), IDLE, profile, now=0.0, free_at=0.0, decoded_at=0.0):
            images = sorted([*images, (instant, widths)], key=lambda image: image[0])
    left, now, num_answered = images, 0.0, 0
    while left:
        decision = planned()(queue_of(left), IDLE, profile, now)
        if decision.batch:
            now += profile.p50(decision.width, len(decision.batch))
        num_answered += sum(now <= left[i][0] for i in decision.batch)
        left = [image for i, image in enumerate(left) if i not in {*decision.batch, *decision.shed}]
    return len(images), num_answered


@pytest.mark.parametrize(
    ("kinds", "least"),
    [
        ([ALL], 1500),
        ([ALL] * 9 + [(WIDE,)], 1450),
        ([ALL, (WIDE,)], 1250),
        ([ALL, (MIDDLE, WIDE), (NARROW,)], 1400),
    ],
)
def test_who_is_let_in_is_answered_in_time(kinds: Sequence[tuple[Width, ...]], least: int) -> None:
    """All but one in a hundred, who are given up for others; and many are let in though some are pinned."""
    chance = random.Random(5)
    counts = [served(kinds, chance, profile) for profile in [PROFILE, make_profile(samples=1)] * 20]
    num_admitted, num_answered = (sum(each) for each in zip(*counts, strict=True))
    assert num_admitted >= least
    assert num_answered >= 0.99 * num_admitted


def test_a_decision_depends_on_its_arguments_and_changes_none() -> None:
    chance, profile = random.Random(3), make_profile()
    for _ in range(50):
        profile.rows(NARROW), profile.rows(MIDDLE), profile.rows(WIDE)
        before = copy.deepcopy(vars(profile))
        queue, load = make_queue(chance), make_load(chance)
        given = copy.deepcopy(queue)
        decision, again = planned()(queue, load, profile, 0.0), planned()(given, load, make_profile(), 0.0)
        assert (chosen(decision), decision.predicted_s) == (chosen(again), again.predicted_s)
        assert queue == given
        assert vars(profile) == before


def test_time_is_relative() -> None:
    chance, hour = random.Random(4), 3600.0
    for _ in range(100):
        queue, load = make_queue(chance), make_load(chance)
        later = replace(queue, due=[instant + hour for instant in queue.due])
        decision, then = planned()(queue, load, PROFILE, 0.0), planned()(later, load, PROFILE, hour)
        assert chosen(then) == chosen(decision)
