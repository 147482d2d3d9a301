"""Policies on schedules worked out by hand. Time is 0 now; budgets and latencies are in milliseconds.

The profile, p50 = p99, of which the last column is the time per image of a batch of four:

    width 0.25 (accuracy 0.5):  10, 12, 16 ms for 1, 2, 4 images:   4 ms
    width 0.5  (accuracy 0.6):  20, 24, 32 ms                       8 ms
    width 1    (accuracy 0.7):  40, 48, 64 ms                      16 ms
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.policies import Policy, policy_of
from server.policies.adaptive import adaptive, all_in_time, outlook, usable
from server.policies.fixed import Fixed
from server.types import Decision, Load, Waiting

NARROW, MIDDLE, WIDE = Width(0.25), Width(0.5), Width(1.0)
ALL = (NARROW, MIDDLE, WIDE)
MEASURED = {NARROW: 0.5, MIDDLE: 0.6, WIDE: 0.7}
BATCH_MS = {1: 40.0, 2: 48.0, 4: 64.0}  # at full width; others take their share
IDLE = Load()


def make_profile(samples: int = 20, max_batch: int = 4, widths: Sequence[Width] = ALL) -> LatencyProfile:
    profile = LatencyProfile(MEASURED, max_batch)
    for width in widths:
        for batch, ms in BATCH_MS.items():
            profile.record(width, batch, [float(width) * ms / 1000] * samples)
    return profile


PROFILE = make_profile()


def due(
    ms: float, count: int = 1, *, widths: tuple[Width, ...] = ALL, order_by_ms: float | None = None
) -> list[Waiting]:
    return [Waiting((ms if order_by_ms is None else order_by_ms) / 1000, ms / 1000, widths)] * count


def decide(queue: Sequence[Waiting], load: Load = IDLE, profile: LatencyProfile = PROFILE) -> Decision:
    return adaptive(queue, load, profile, 0.0)


# -- one image, nobody else


def test_an_idle_server_with_time_spends_it_on_accuracy() -> None:
    decision = decide(due(1000))
    assert (decision.width, decision.batch, decision.shed) == (WIDE, (0,), frozenset())
    assert decision.predicted_s == pytest.approx(0.040)
    assert decision.reason


@pytest.mark.parametrize(("budget_ms", "width"), [(40, WIDE), (39, MIDDLE), (20, MIDDLE), (19, NARROW), (10, NARROW)])
def test_the_most_accurate_width_that_is_in_time(budget_ms: float, width: Width) -> None:
    assert (decide(due(budget_ms)).width, decide(due(budget_ms)).batch) == (width, (0,))


def test_an_image_that_is_late_at_every_width_is_shed() -> None:
    decision = decide(due(9))
    assert not decision.batch
    assert decision.shed == {0}


@pytest.mark.parametrize("policy", [adaptive, Fixed(NARROW)])
def test_an_image_that_may_be_in_time_is_run_though_its_p99_is_late(policy: Policy) -> None:
    profile = make_profile(samples=1)  # p50 is 10 ms, p99 is 15 ms
    assert policy(due(11), IDLE, profile, 0.0).batch == (0,)
    assert policy(due(9), IDLE, profile, 0.0).shed == {0}


def test_a_width_is_chosen_by_its_p99() -> None:
    profile = make_profile(samples=1)
    assert [decide(due(ms), profile=profile).width for ms in (61, 59, 31, 29)] == [WIDE, MIDDLE, MIDDLE, NARROW]


# -- load


def test_the_width_follows_the_arrival_rate_down_and_up_again() -> None:
    """Affordable while arrivals at that width, in batches of four, leave the device idle for a fifth of the time."""
    two = due(1000, 2)
    up = [
        (0, WIDE),
        (49, WIDE),
        (51, MIDDLE),
        (99, MIDDLE),
        (101, NARROW),
        (199, NARROW),
        (201, NARROW),
        (9999, NARROW),
    ]
    for rate, width in [*up, *reversed(up)]:
        assert decide(two, Load(arrival_rate=rate)).width == width, rate


def test_an_image_alone_gets_what_it_has_time_for() -> None:
    """One caller who asks again at every answer is no overload, however fast the answers come."""
    assert decide(due(1000), Load(arrival_rate=500)).width == WIDE


def test_a_faster_stream_never_gets_a_wider_width() -> None:
    widths = [decide(due(1000, 2), Load(arrival_rate=rate)).width for rate in range(300)]
    assert widths == sorted(widths, reverse=True)


def test_more_waiting_images_never_get_a_wider_width() -> None:
    widths = [decide(due(200, count)).width for count in range(1, 60)]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(
    ("count", "width"),
    [
        (1, WIDE),
        (12, WIDE),  # 3 x 64 = 192 ms
        (13, MIDDLE),
        (24, MIDDLE),  # 6 x 32 = 192 ms
        (25, NARROW),
        (48, NARROW),  # 12 x 16 = 192 ms
        (200, NARROW),  # some will be late; the narrowest saves the most
    ],
)
def test_a_long_queue_gets_a_narrow_width(count: int, width: Width) -> None:
    decision = decide(due(200, count))
    assert (decision.width, decision.batch, decision.shed) == (width, tuple(range(min(4, count))), frozenset())


def test_what_waits_behind_counts() -> None:
    assert decide(due(50) + due(60)).width == WIDE  # both in 48 ms
    assert decide(due(50) + due(60) + due(61)).width == MIDDLE  # three in 32 ms; at full width the third ends at 88
    assert decide(due(50) + due(60) + due(1000)).width == WIDE


@pytest.mark.parametrize(
    ("interference", "width"), [(1.0, WIDE), (1.2, MIDDLE), (2.2, MIDDLE), (2.3, NARROW), (4.5, NARROW)]
)
def test_interference_makes_everything_take_longer(interference: float, width: Width) -> None:
    decision = decide(due(45), Load(interference=interference))
    assert (decision.width, decision.batch) == (width, (0,))
    assert decision.predicted_s == pytest.approx(0.040 * float(width) * interference)


def test_interference_sheds_what_it_makes_late() -> None:
    assert decide(due(45), Load(interference=4.6)).shed == {0}


def test_interference_leaves_less_of_the_device_to_arrivals() -> None:
    assert decide(due(1000, 2), Load(arrival_rate=49)).width == WIDE
    assert decide(due(1000, 2), Load(arrival_rate=49, interference=1.1)).width == MIDDLE


@pytest.mark.parametrize("delay", ["hop_s", "respond_s"])
def test_time_before_and_after_the_engine_counts(delay: str) -> None:
    assert decide(due(45), replace(IDLE, **{delay: 0.004})).width == WIDE
    assert decide(due(45), replace(IDLE, **{delay: 0.006})).width == MIDDLE


@pytest.mark.parametrize("delay", ["hop_s", "respond_s"])
def test_a_batch_leaves_its_head_the_time_around_the_engine(delay: str) -> None:
    """Two images take 12 ms. Together with 5 ms more the first would be late; alone it is in time."""
    assert decide(due(16) + due(100)).batch == (0, 1)
    decision = decide(due(16) + due(100), replace(IDLE, **{delay: 0.005}))
    assert (decision.width, decision.batch) == (NARROW, (0,))


@pytest.mark.parametrize("delay", ["hop_s", "respond_s"])
def test_an_image_that_the_time_around_the_engine_makes_late_is_shed(delay: str) -> None:
    assert decide(due(12), replace(IDLE, **{delay: 0.001})).batch == (0,)
    assert decide(due(12), replace(IDLE, **{delay: 0.003})).shed == {0}


def test_each_batch_of_the_stream_pays_its_hop() -> None:
    assert decide(due(1000, 2), Load(arrival_rate=49, hop_s=0.001)).width == WIDE  # 49 x (16 + 1 / 4) ms < 0.8
    assert decide(due(1000, 2), Load(arrival_rate=49, hop_s=0.002)).width == MIDDLE  # 49 x (16 + 2 / 4) ms > 0.8


# -- who is in the batch


def test_nobody_is_late_who_could_be_in_time() -> None:
    assert decide(due(12) + due(1000)).batch == (0, 1)  # two take 12 ms
    decision = decide(due(11) + due(1000))
    assert (decision.width, decision.batch, decision.shed) == (NARROW, (0,), frozenset())


def test_only_the_hopeless_are_shed() -> None:
    decision = decide(due(5, 2) + due(9) + due(100) + due(1000))
    assert decision.batch == (3, 4)
    assert decision.shed == {0, 1, 2}


def test_a_batch_is_at_most_the_largest_on_offer() -> None:
    assert decide(due(1000, 9)).batch == (0, 1, 2, 3)


def test_a_batch_of_any_size_between_the_profiled_ones() -> None:
    assert decide(due(57, 4)).width == MIDDLE  # four at full width take 64 ms
    assert decide(due(57, 3)).batch == (0, 1, 2)


@pytest.mark.parametrize("policy", [adaptive, Fixed(NARROW)])
def test_while_only_single_images_are_warmed_batches_are_single(policy: Policy) -> None:
    profile = LatencyProfile(MEASURED, 4)
    profile.record(NARROW, 1, [0.010])
    profile.record(WIDE, 1, [0.040])
    assert policy(due(1000, 3), IDLE, profile, 0.0).batch == (0,)


def test_a_batch_has_one_width_and_who_does_not_allow_it_waits() -> None:
    queue = due(1000) + due(1000, widths=(WIDE,)) + due(1000, widths=(MIDDLE, WIDE)) + due(1000)
    busy = Load(arrival_rate=60)
    assert (decide(queue).width, decide(queue).batch) == (WIDE, (0, 1, 2, 3))
    decision = decide(queue, busy)
    assert (decision.width, decision.batch) == (MIDDLE, (0, 2, 3))
    left = [queue[1]]
    assert (decide(left, busy).width, decide(left, busy).batch) == (WIDE, (0,))


@pytest.mark.parametrize("policy", [adaptive, Fixed(NARROW)])
@pytest.mark.parametrize("widths", [(WIDE,), (MIDDLE,), (MIDDLE, WIDE)])
def test_a_head_that_no_other_shares_its_width_with_does_not_starve(widths: tuple[Width, ...], policy: Policy) -> None:
    crowd = due(1000, 50, widths=(NARROW,))
    decision = policy(due(900, widths=widths) + crowd, Load(arrival_rate=500), PROFILE, 0.0)
    assert (decision.width, decision.batch) == (widths[0], (0,))


def test_nobody_loses_accuracy_by_joining_a_narrower_batch() -> None:
    queue = due(900, widths=(NARROW,)) + due(1000) + due(1000, widths=(NARROW,))
    assert (decide(queue).width, decide(queue).batch) == (NARROW, (0, 2))
    assert decide(queue[1:2]).width == WIDE
    busy = Load(arrival_rate=500)
    assert (decide(queue, busy).width, decide(queue, busy).batch) == (NARROW, (0, 1, 2)), "where all are narrow anyway"


def test_a_floor_holds_under_any_load() -> None:
    floor = due(1000, 2, widths=(MIDDLE, WIDE))
    assert [decide(floor, Load(arrival_rate=rate)).width for rate in (0, 60, 500)] == [WIDE, MIDDLE, MIDDLE]
    assert decide(due(15, widths=(MIDDLE, WIDE))).shed == {0}, "not served below its floor"


def test_an_image_that_forbids_a_width_is_counted_at_one_that_it_allows() -> None:
    """The second would run at full width, so it is the second batch, of 40 ms, that decides the first one's width."""
    assert decide(due(60) + due(79, widths=(WIDE,))).width == WIDE  # 48 ms together
    assert decide(due(40) + due(79, widths=(WIDE,))).width != WIDE


# -- requests without a budget: ordered by ``order_by``, ended by ``deadline``


def test_an_image_without_a_budget_is_due_by_its_place_in_the_queue() -> None:
    assert decide(due(10_000, order_by_ms=40)).width == WIDE
    assert decide(due(10_000, order_by_ms=39)).width == MIDDLE


@pytest.mark.parametrize("order_by_ms", [-5000, 0, 9])
def test_where_that_cannot_be_reached_any_more_its_deadline_counts(order_by_ms: float) -> None:
    decision = decide(due(10_000, order_by_ms=order_by_ms))
    assert (decision.width, decision.batch, decision.shed) == (WIDE, (0,), frozenset())


def test_an_image_past_its_place_neither_hurries_nor_harms_those_with_a_budget() -> None:
    decision = decide(due(10_000, order_by_ms=-5) + due(45))
    assert (decision.width, decision.batch) == (MIDDLE, (0, 1))  # both in 24 ms; one after the other takes 80


def test_an_image_without_a_budget_is_shed_at_its_deadline_only() -> None:
    assert decide(due(9, order_by_ms=-90)).shed == {0}


# -- widths that are not worth it


def test_a_dominated_width_is_never_chosen() -> None:
    profile = LatencyProfile({NARROW: 0.5, MIDDLE: 0.5, WIDE: 0.7}, 4)
    for width in ALL:
        for batch, ms in BATCH_MS.items():
            profile.record(width, batch, [float(width) * ms / 1000] * 20)
    chosen = {decide(due(ms), Load(rate), profile).width for ms in range(10, 100) for rate in (0, 60, 300)}
    assert chosen == {NARROW, WIDE}


def test_a_width_that_only_looks_narrow_is_never_chosen() -> None:
    profile = LatencyProfile(MEASURED, 1)
    for width in ALL:
        profile.record(width, 1, [0.010] * 20)
    assert {decide(due(ms), Load(rate), profile).width for ms in (10, 1000) for rate in (0, 300)} == {WIDE}


def make_gpu_profile() -> LatencyProfile:
    """One image takes 10 ms at every width; at full width two take 4 ms more and four 14, at others a share of it."""
    profile = LatencyProfile(MEASURED, 4)
    for width in ALL:
        for batch, more_ms in ((1, 0.0), (2, 4.0), (4, 14.0)):
            profile.record(width, batch, [(10 + float(width) * more_ms) / 1000] * 20)
    return profile


GPU = make_gpu_profile()


@pytest.mark.parametrize(
    ("count", "budget_ms", "width"),
    [
        (1, 1000, WIDE),
        (1, 10, WIDE),  # as fast as any
        (2, 14, WIDE),
        (2, 13, MIDDLE),  # 12 ms
        (2, 11, NARROW),
        (4, 25, WIDE),  # 24 ms
        (4, 23, MIDDLE),  # 17 ms
        (4, 16, NARROW),  # 13.5 ms
        (8, 49, WIDE),
        (8, 47, MIDDLE),
        (8, 33, NARROW),
    ],
)
def test_a_narrow_width_is_worthwhile_from_the_batch_on_that_it_makes_faster(
    count: int, budget_ms: float, width: Width
) -> None:
    assert decide(due(budget_ms, count), profile=GPU).width == width


def test_nobody_runs_narrow_alone_where_that_saves_no_time() -> None:
    """Not even under a rate of arrivals that no width sustains."""
    for rate in (0, 500):
        assert {decide(due(ms), Load(rate), GPU).width for ms in range(10, 60)} == {WIDE}
    assert decide(due(1000, 4), Load(arrival_rate=500), GPU).width == NARROW


def test_under_overload_the_fastest_is_who_is_fastest_at_the_batch_that_runs() -> None:
    profile = make_gpu_profile()
    profile.record(WIDE, 1, [0.0099] * 200)  # noise: alone, the widest looks the fastest
    assert profile.fastest == WIDE
    assert decide(due(1000, 4), Load(arrival_rate=500), profile).width == NARROW


def test_only_those_who_may_join_make_a_batch_large() -> None:
    """Four wait, too many for any width, but three of them at another: the first, alone, gains nothing by a loss."""
    crowd = due(22, 3, widths=(NARROW,))
    decision = decide(due(11, widths=(MIDDLE, WIDE)) + crowd, profile=GPU)
    assert (decision.width, decision.batch) == (WIDE, (0,))
    assert decide(due(11) + crowd, profile=GPU).width == NARROW, "who allows their width may be joined by them"


def test_a_width_that_offers_smaller_batches_is_judged_at_those() -> None:
    """The device has no memory for four at full width: two take 14 ms there, no longer dominate, and are dominated."""
    profile = LatencyProfile({NARROW: 0.5, MIDDLE: 0.7, WIDE: 0.7}, 4)
    for width, batch, ms in ((MIDDLE, 1, 10), (MIDDLE, 2, 12), (MIDDLE, 4, 24), (WIDE, 1, 10), (WIDE, 2, 14)):
        profile.record(width, batch, [ms / 1000] * 20)
    assert usable(ALL, profile, 4) == usable(ALL, profile, 2) == [MIDDLE]
    assert usable((WIDE,), profile, 4) == [WIDE]
    assert decide(due(1000, 4), profile=profile).batch == (0, 1, 2, 3)


def test_the_slowest_of_a_mixed_queue_is_judged_at_its_batches() -> None:
    """Four at full width take 24 ms, though one of them looks faster there than at the middle width."""
    profile = make_gpu_profile()
    profile.record(MIDDLE, 1, [0.0101] * 200)
    queue = due(23) + due(23, 3, widths=(WIDE,))
    assert not all_in_time(MIDDLE, outlook(queue, IDLE, profile, 0.0))
    assert all_in_time(MIDDLE, outlook(due(23, 4), IDLE, profile, 0.0))


def test_whoever_pins_a_dominated_width_gets_it() -> None:
    profile = LatencyProfile({NARROW: 0.5, MIDDLE: 0.5}, 1)
    profile.record(NARROW, 1, [0.010])
    profile.record(MIDDLE, 1, [0.020])
    assert profile.dominated_at(1) == {MIDDLE}
    assert decide(due(1000, widths=(MIDDLE,)), profile=profile).width == MIDDLE


def test_a_width_that_is_not_warmed_is_never_chosen() -> None:
    profile = make_profile(widths=(NARROW, WIDE))
    assert {decide(due(ms), profile=profile).width for ms in range(10, 100)} == {NARROW, WIDE}


# -- widths that went off the offer while images wait for them


@pytest.mark.parametrize("policy", [adaptive, Fixed(NARROW)])
def test_who_allows_no_width_on_offer_any_more_is_shed(policy: Policy) -> None:
    profile = make_profile()
    profile.withdraw(WIDE, 1)
    decision = policy(due(1000, widths=(WIDE,)) + due(1000, 2), IDLE, profile, 0.0)
    assert (decision.batch, decision.shed) == ((1, 2), frozenset({0}))
    for width in (NARROW, MIDDLE):
        profile.withdraw(width, 1)
    decision = policy(due(1000, 2), IDLE, profile, 0.0)
    assert (decision.batch, decision.shed) == ((), frozenset({0, 1}))


# -- the plain alternative


@pytest.mark.parametrize("width", ALL)
def test_a_fixed_width_is_the_same_under_any_load(width: Width) -> None:
    for load in (IDLE, Load(arrival_rate=500), Load(interference=3.0)):
        decision = Fixed(width)(due(1000, 9), load, PROFILE, 0.0)
        assert (decision.width, decision.batch) == (width, (0, 1, 2, 3))


def test_a_fixed_width_is_kept_though_it_is_dominated() -> None:
    profile = LatencyProfile({NARROW: 0.5, WIDE: 0.5}, 1)
    profile.record(NARROW, 1, [0.010])
    profile.record(WIDE, 1, [0.040])
    assert profile.dominated_at(1) == {WIDE}
    assert Fixed(WIDE)(due(1000), IDLE, profile, 0.0).width == WIDE


def test_a_fixed_width_keeps_its_batches_in_time() -> None:
    assert Fixed(WIDE)(due(50, 4), IDLE, PROFILE, 0.0).batch == (0, 1)
    assert Fixed(WIDE)(due(45, 4), IDLE, PROFILE, 0.0).batch == (0,)
    assert Fixed(WIDE)(due(9) + due(1000), IDLE, PROFILE, 0.0).shed == {0}


def test_a_fixed_width_gives_way_to_a_pin_or_a_floor() -> None:
    queue = due(1000, widths=(MIDDLE, WIDE)) + due(1000)
    decision = Fixed(NARROW)(queue, IDLE, PROFILE, 0.0)
    assert (decision.width, decision.batch) == (MIDDLE, (0, 1))


def test_policies_by_name() -> None:
    assert policy_of("adaptive", ALL) is adaptive
    assert policy_of("fixed:0.5", ALL) == policy_of("fixed:.50", ALL) == Fixed(MIDDLE)
    with pytest.raises(ValueError, match=r"trained widths: 0\.25, 0\.5, 1$"):
        policy_of("fixed:0.3", ALL)
    with pytest.raises(ValueError, match="'adaptive' and 'fixed:<width>'"):
        policy_of("slackfit", ALL)


# -- whatever the queue


def make_queue(chance: random.Random) -> list[Waiting]:
    allowed = [ALL, ALL, ALL, (MIDDLE, WIDE), (NARROW,), (WIDE,)]
    queue = []
    for _ in range(chance.randint(1, 30)):
        order_by = chance.choice((chance.uniform(-0.1, 0.1), chance.uniform(0, 2)))
        late_s = chance.choice((0.0, 0.0, chance.uniform(0, 5)))
        queue.append(Waiting(order_by, order_by + late_s, chance.choice(allowed)))
    return sorted(queue, key=lambda item: item.order_by)


def make_load(chance: random.Random) -> Load:
    return Load(
        arrival_rate=chance.choice((0.0, chance.uniform(0, 500))),
        interference=chance.choice((1.0, chance.uniform(1, 10))),
        hop_s=chance.choice((0.0, chance.uniform(0, 0.02))),
        respond_s=chance.choice((0.0, chance.uniform(0, 0.02))),
    )


@pytest.mark.parametrize("policy", [adaptive, Fixed(MIDDLE)])
def test_every_decision_is_sound(policy: Policy) -> None:
    chance = random.Random(0)
    for case in range(500):
        queue, load = make_queue(chance), make_load(chance)
        decision = policy(queue, load, PROFILE, 0.0)
        batch = decision.batch
        assert batch or decision.shed == set(range(len(queue))), case
        assert len(batch) <= PROFILE.max_batch(decision.width)
        assert list(batch) == sorted(set(batch))
        assert {*batch, *decision.shed} <= set(range(len(queue)))
        assert decision.shed.isdisjoint(batch)
        assert all(decision.width in queue[i].widths for i in batch)
        assert not batch or batch[0] == min(set(range(len(queue))) - decision.shed), "the head is served"


@pytest.mark.parametrize("policy", [adaptive, Fixed(MIDDLE)])
def test_a_decision_depends_on_its_arguments_and_changes_none(policy: Policy) -> None:
    chance, profile = random.Random(1), make_profile()
    before = copy.deepcopy(vars(profile))
    for _ in range(100):
        queue, load = make_queue(chance), make_load(chance)
        given = list(queue)
        decisions = [policy(queue, load, profile, 0.0), policy(tuple(queue), load, make_profile(), 0.0)]
        assert decisions[0] == decisions[1]
        assert queue == given
    assert vars(profile) == before


def test_time_is_relative() -> None:
    chance = random.Random(2)
    for _ in range(100):
        queue, load, hour = make_queue(chance), make_load(chance), 3600.0
        later = [replace(item, order_by=item.order_by + hour, deadline=item.deadline + hour) for item in queue]
        decision, then = decide(queue, load), adaptive(later, load, PROFILE, hour)
        assert (then.width, then.batch, then.shed) == (decision.width, decision.batch, decision.shed)
        assert then.predicted_s == pytest.approx(decision.predicted_s)


@pytest.mark.parametrize("load", [IDLE, Load(interference=1.5, hop_s=0.002, respond_s=0.001)])
def test_a_queue_that_single_images_could_serve_in_time_is_served_in_time(load: Load) -> None:
    """Followed to its end: whatever width was spent on the first ones, nobody behind them pays for it."""
    chance = random.Random(3)
    single_s = 0.0101 * load.interference + load.hop_s
    for case in range(100):
        latest_s = chance.choice((5, 30)) * single_s
        budgets = sorted(chance.uniform(single_s, latest_s) for _ in range(chance.randint(1, 20)))
        deadlines = [max(budget, single_s * place) + load.respond_s for place, budget in enumerate(budgets, 1)]
        queue, now = [Waiting(deadline, deadline, ALL) for deadline in sorted(deadlines)], 0.0
        while queue:
            decision = adaptive(queue, load, PROFILE, now)
            assert not decision.shed, case
            now += load.hop_s + decision.predicted_s
            assert all(now + load.respond_s <= queue[i].deadline for i in decision.batch), case
            queue = [item for i, item in enumerate(queue) if i not in decision.batch]
