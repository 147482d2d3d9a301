"""Deadline arithmetic worked out by hand, on the profile of ``situations.py``."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.policies.deadlines import (
    Sizes,
    admissible,
    fastest_of,
    fits,
    in_time,
    lanes_in_time,
    lanes_of,
    margin_s,
    mixed_margin_s,
    mixed_work_s,
    quickest_of,
    sizes_for,
    soonest_of,
    work_s,
)
from server.types import Load, QueueView
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
    queue_of,
)

SIZES = ((4, 0.016), (2, 0.012), (1, 0.010))
EPSILON_S = 1e-9


def in_ms(sizes: Sizes) -> list[tuple[int, float]]:
    return [(size, round(1000 * taken, 6)) for size, taken in sizes]


def seconds(*ms: float) -> list[float]:
    return [each / 1000 for each in ms]


# -- what the device offers


def test_the_fastest_width_is_the_one_that_gets_through_the_most_images() -> None:
    """Alone, an image is faster at the narrowest width; four are faster at the middle one."""
    profile = LatencyProfile(MEASURED, 4)
    for width, alone_ms, four_ms in ((NARROW, 10, 40), (MIDDLE, 11, 20), (WIDE, 40, 60)):
        profile.record(width, 1, seconds(alone_ms) * 20)
        profile.record(width, 2, seconds((alone_ms + four_ms) / 2) * 20)
        profile.record(width, 4, seconds(four_ms) * 20)
    assert fastest_of(ALL, profile) == MIDDLE
    assert fastest_of((NARROW, WIDE), profile) == NARROW
    assert fastest_of((WIDE,), profile) == WIDE
    profile.withdraw(MIDDLE, 1)
    assert fastest_of(ALL, profile) == NARROW
    assert fastest_of((MIDDLE,), profile) is None


@pytest.mark.parametrize(
    ("widths", "sizes_ms"),
    [
        (ALL, [(4, 16), (2, 12), (1, 10)]),
        ((MIDDLE, WIDE), [(4, 32), (2, 24), (1, 20)]),
        ((WIDE,), [(4, 64), (2, 48), (1, 40)]),
        ((), []),
    ],
)
def test_images_are_counted_at_the_fastest_width_that_they_allow(
    widths: tuple[Width, ...], sizes_ms: Sequence[tuple[int, float]]
) -> None:
    assert in_ms(sizes_for(widths, IDLE, PROFILE)) == sizes_ms


def gpu_profile() -> LatencyProfile:
    """One image takes 2.1 ms at the narrowest width and 2.0 at the widest; four take 2.4 and 8."""
    profile = LatencyProfile({NARROW: 0.5, WIDE: 0.7}, 4)
    for width, *each_ms in ((NARROW, 2.1, 2.2, 2.4), (WIDE, 2.0, 4.0, 8.0)):
        for batch, ms in zip((1, 2, 4), each_ms, strict=True):
            profile.record(width, batch, seconds(ms) * 20)
    return profile


def test_one_image_alone_is_counted_at_the_width_that_takes_least_for_one() -> None:
    profile = gpu_profile()
    assert (fastest_of(profile.widths, profile), quickest_of(profile.widths, profile)) == (NARROW, WIDE)
    assert in_ms(sizes_for(profile.widths, IDLE, profile)) == [(4, 2.4), (2, 2.2), (1, 2.0)]
    assert in_ms(sizes_for((NARROW,), IDLE, profile)) == [(4, 2.4), (2, 2.2), (1, 2.1)]
    assert soonest_of(profile.widths, IDLE, profile, 7.0) == pytest.approx(7.002)
    assert quickest_of((MIDDLE,), profile) is None
    profile.withdraw(WIDE, 1)
    assert quickest_of(ALL, profile) == NARROW


def test_in_a_lane_are_those_who_may_always_run_together() -> None:
    """The same tuple twice, an equal one, and (MIDDLE, WIDE) and (MIDDLE,), of which either is fastest at the middle
    one."""
    copy = (*ALL,)
    lanes, sizes = lanes_of([ALL, (WIDE,), ALL, copy, (MIDDLE, WIDE), (NARROW,), (MIDDLE,)], IDLE, PROFILE)
    assert list(lanes) == [0, 1, 0, 0, 2, 0, 2]
    assert [in_ms(each)[-1] for each in sizes] == [(1, 10), (1, 40), (1, 20)]
    lanes, sizes = lanes_of([(NARROW, WIDE), (NARROW,), (WIDE,)], IDLE, gpu_profile())
    assert list(lanes) == [0, 1, 2], "for one image the first would take the widest, which the second does not allow"
    assert [in_ms(each)[-1] for each in sizes] == [(1, 2.0), (1, 2.1), (1, 2.0)]


def test_each_batch_takes_its_median_times_interference_and_its_hop() -> None:
    sizes = sizes_for(ALL, Load(interference=2.0, hop_s=0.001, respond_s=9.0), make_profile(samples=1))
    assert in_ms(sizes) == [(4, 33), (2, 25), (1, 21)]


def test_widths_that_are_not_on_offer_offer_nothing() -> None:
    assert sizes_for((WIDE,), IDLE, make_profile(widths=(NARROW, MIDDLE))) == ()


def test_an_image_could_be_answered_after_its_own_run_and_the_way_there_and_back() -> None:
    load = Load(interference=2.0, hop_s=0.001, respond_s=0.003)
    assert soonest_of(ALL, load, PROFILE, 7.0) == pytest.approx(7.024)
    assert soonest_of((WIDE,), load, PROFILE, 7.0) == pytest.approx(7.084)
    assert soonest_of((WIDE,), load, make_profile(widths=(NARROW,)), 7.0) == math.inf


# -- who can be in time


@pytest.mark.parametrize(
    ("due_ms", "free_at_ms", "fine"),
    [
        ([], 1000, True),
        ([10], 0, True),
        ([9.9], 0, False),
        ([10], 0.1, False),
        ([16, 16, 16, 16], 0, True),
        ([16, 16, 16, 16], 0.1, False),  # two in 12 ms, and the others cannot wait
        ([12, 12], 0, True),
        ([11, 11], 0, False),
        ([10, 20], 0, True),  # one by one
        ([10, 19.9], 0, False),
        ([12, 16, 28], 0, True),  # two in 12 ms, then four could run until 28
        ([16, 16, 16, 16, 26], 0, True),
        ([16, 16, 16, 16, 25.9], 0, False),
        ([16, 16, 16, 16, 32, 32, 32, 32], 0, True),
        ([16, 16, 16, 16, 32, 32, 32, 31.9], 0, False),  # sorted, the fifth of them has 15.9 ms left
        ([40, 40, 40, 40, 40], 0, True),
    ],
)
def test_a_queue_is_served_in_the_largest_batches_that_its_first_can_wait_for(
    due_ms: Sequence[float], free_at_ms: float, fine: bool
) -> None:
    instants = [ms / 1000 + EPSILON_S for ms in sorted(due_ms)]
    assert in_time(instants, 0, free_at_ms / 1000, SIZES) is fine
    assert in_time([0.001, 0.002, *instants], 2, free_at_ms / 1000, SIZES) is fine, "those before are not looked at"


def test_in_time_is_what_an_independent_schedule_finds() -> None:
    """Written down as a simulation that marks each image with its finish."""
    chance = random.Random(0)
    outcomes = set()
    for _ in range(500):
        instants = sorted(chance.uniform(0.005, 0.1) for _ in range(chance.randint(1, 12)))
        finished, clock = list[float](), 0.002
        while len(finished) < len(instants):
            possible = [(size, s) for size, s in SIZES if clock + s <= instants[len(finished)]]
            size, taken = max(possible, default=(1, math.inf))
            clock += taken
            finished += [clock] * size
        fine = all(end <= instant for end, instant in zip(finished, instants, strict=False))
        assert in_time(instants, 0, 0.002, SIZES) is fine
        outcomes.add(fine)
    assert outcomes == {True, False}


PINNED = ((4, 0.064), (2, 0.048), (1, 0.040))


@pytest.mark.parametrize(
    ("usual_ms", "pinned_ms", "fine"),
    [
        ([], [40], True),
        ([], [39.9], False),
        ([16, 16, 16, 16], [600], True),  # and the pinned one has until 56
        ([16, 16, 16, 16], [56], True),
        ([16, 16, 16, 16], [55.9], False),
        ([16, 16, 16, 600], [600], True),
        ([50], [40], True),  # the pinned one first, as he is more urgent
        ([49.9], [40], False),
        ([50], [64], True),  # alone: a batch of four would take until 74
        ([10], [88, 88, 88, 88], True),  # three or four of them in 64 ms
        ([10], [58, 98], True),  # both in 48 ms
        ([10], [57.9, 98], True),  # one by one
        ([10], [57.9, 89.9], False),
        ([48.1], [48], False),  # together at full width they would be in time: a batch is of one lane
    ],
)
def test_who_is_pinned_takes_his_own_time_and_delays_only_those_behind_him(
    usual_ms: Sequence[float], pinned_ms: Sequence[float], fine: bool
) -> None:
    queue = sorted([*((ms, 0) for ms in usual_ms), *((ms, 1) for ms in pinned_ms)])
    instants = [ms / 1000 + EPSILON_S for ms, _ in queue]
    assert lanes_in_time(instants, bytes(lane for _, lane in queue), 0.0, (SIZES, PINNED)) is fine


def test_lanes_in_time_is_what_an_independent_schedule_finds() -> None:
    """Written down as waiting lists from which batches are taken."""
    chance = random.Random(0)
    outcomes = set()
    for _ in range(500):
        queue = sorted((chance.uniform(0.005, 0.3), chance.randint(0, 1)) for _ in range(chance.randint(1, 15)))
        waiting, clock, fine = [*queue], 0.002, True
        while waiting:
            due, lane = waiting[0]
            mine = [each for each in waiting if each[1] == lane]
            possible = [(size, s) for size, s in (SIZES, PINNED)[lane] if clock + s <= due]
            enough = [(size, s) for size, s in possible if size >= len(mine)]
            size, taken = min(enough) if enough else max(possible, default=(1, math.inf))
            clock += taken
            fine &= all(clock <= instant for instant, _ in mine[:size])
            waiting = [each for each in waiting if each not in mine[:size]]
        assert (
            lanes_in_time([due for due, _ in queue], bytes(lane for _, lane in queue), 0.002, (SIZES, PINNED)) is fine
        )
        outcomes.add(fine)
    assert outcomes == {True, False}


def newcomer_fits(waiting: Sequence[Image], ms: float, clock: float = 0.0, widths: tuple[Width, ...] = ALL) -> bool:
    return fits(queue_of(waiting), ms / 1000, widths, clock, IDLE, PROFILE)


def test_a_newcomer_fits_where_neither_he_nor_who_waits_is_late() -> None:
    assert newcomer_fits(due(16.1, 3), 16.1)
    assert not newcomer_fits(due(16.1, 3), 15.9), "with him the others would be late"
    assert not newcomer_fits(due(16.1, 4), 16.1), "the fifth"
    assert not newcomer_fits(due(16.1, 4), 25.9)
    assert newcomer_fits(due(16.1, 4), 26.2), "behind the batch of four"


def test_who_is_late_in_any_case_is_no_obstacle() -> None:
    assert newcomer_fits([*due(5), *due(9.9)], 10.1)
    assert not newcomer_fits([*due(5), *due(10.1)], 10.1), "this one is not lost yet"
    assert newcomer_fits(due(39.9, widths=(WIDE,)), 40.1), "the pinned one is"
    assert not newcomer_fits(due(40.1, widths=(WIDE,)), 40.1)


def test_whoever_cannot_be_in_time_alone_does_not_fit() -> None:
    assert not newcomer_fits([], 9.9)
    assert not newcomer_fits([], 10.1, clock=0.001)
    assert not newcomer_fits([], 39.9, widths=(WIDE,))


def test_who_has_no_time_to_spare_is_not_waited_for_but_takes_his_time() -> None:
    """The pinned one could just be in time, though not with a margin of 5 ms; he will take 40."""
    tight = queue_of(due(42, widths=(WIDE,)))
    for ms, fine in ((55.1, True), (54.9, False)):
        assert fits(tight, ms / 1000, ALL, 0.0, IDLE, PROFILE, spare_s=0.005) is fine


@pytest.mark.parametrize(
    ("images", "ms"), [(0, 0), (1, 10), (2, 12), (3, 16), (4, 16), (5, 26), (6, 28), (7, 32), (8, 32)]
)
def test_few_images_are_not_taken_for_a_whole_batch(images: int, ms: float) -> None:
    assert work_s(images, SIZES) == pytest.approx(ms / 1000)


def test_the_work_of_a_mixed_queue_is_in_the_proportion_of_its_kinds() -> None:
    """Four take 16 ms or, pinned, 64."""
    assert mixed_work_s(4, {ALL: 3, (WIDE,): 1}, IDLE, PROFILE) == pytest.approx(0.028)
    assert mixed_work_s(4, {ALL: 3, (Width(0.75),): 1}, IDLE, PROFILE) == pytest.approx(0.016), "not on offer"
    assert mixed_work_s(4, {(Width(0.75),): 1}, IDLE, PROFILE) == 0


@pytest.mark.parametrize(("waiting", "ms"), [(1, 5), (2, 6), (3, 8), (4, 8), (16, 16), (36, 24)])
def test_the_margin_grows_with_the_root_of_how_many_batches_there_are(waiting: int, ms: float) -> None:
    """One, two or four take 10, 12 or 16 ms in the median and half as much longer in one of a hundred runs."""
    careful = make_profile(samples=1)
    assert margin_s(waiting, NARROW, IDLE, careful) == pytest.approx(ms / 1000)
    assert margin_s(waiting, NARROW, Load(interference=2.0), careful) == pytest.approx(2 * ms / 1000)
    assert margin_s(waiting, NARROW, IDLE, PROFILE) == pytest.approx(0)


def test_the_margins_of_kinds_add_up_as_variances_do() -> None:
    """8 ms for four, and 20 for one at full width."""
    careful = make_profile(samples=1)
    assert mixed_margin_s({ALL: 4, (WIDE,): 1}, IDLE, careful) == pytest.approx(math.sqrt(464) / 1000)
    assert mixed_margin_s({ALL: 4, (Width(0.75),): 1}, IDLE, careful) == pytest.approx(0.008), "not on offer"


# -- admission


def least_budget_ms(
    queue: Sequence[Image] = (),
    load: Load = IDLE,
    profile: LatencyProfile = PROFILE,
    *,
    widths: tuple[Width, ...] = ALL,
    free_ms: float = 0.0,
    decoded_ms: float = 0.0,
    preparing: int = 0,
) -> float:
    """From which budget on, in tenths of a millisecond, an image that comes now is let in."""
    view: QueueView = queue_of(queue)
    for tenths in range(1, 3000):
        if admissible(
            tenths / 10_000 + EPSILON_S,
            widths,
            view,
            load,
            profile,
            now=0.0,
            free_at=free_ms / 1000,
            decoded_at=decoded_ms / 1000,
            preparing=preparing,
        ):
            return tenths / 10
    return math.inf


def test_alone_an_image_needs_its_median_run_the_way_there_and_back_and_its_decoding() -> None:
    assert least_budget_ms() == 10
    assert least_budget_ms(widths=(MIDDLE, WIDE)) == 20
    assert least_budget_ms(load=Load(interference=1.5, hop_s=0.001, respond_s=0.002)) == 18
    assert least_budget_ms(decoded_ms=3) == 13
    assert least_budget_ms(profile=make_profile(samples=1)) == 10, "or bad samples could never be outgrown"


def test_decoding_goes_on_while_the_device_is_busy() -> None:
    assert least_budget_ms(free_ms=30) == 40
    assert least_budget_ms(free_ms=30, decoded_ms=25) == 40
    assert least_budget_ms(free_ms=30, decoded_ms=35) == 45
    assert least_budget_ms(free_ms=-9000) == 10, "long idle"


@pytest.mark.parametrize(("preparing", "ms"), [(0, 10), (1, 20), (2, 22), (3, 26), (4, 26), (5, 36), (8, 42)])
def test_images_that_are_being_decoded_are_waited_for_as_long_as_they_take(preparing: int, ms: float) -> None:
    assert least_budget_ms(preparing=preparing) == ms


def test_behind_others_there_is_room_for_a_slow_batch() -> None:
    """p99 is half again the median: two, or one that waits and one behind it, may take 6 ms longer than 12."""
    careful = make_profile(samples=1)
    assert least_budget_ms(due(1000), profile=careful) == pytest.approx(16)  # alone first, for 10 ms; 6 ms to spare
    assert least_budget_ms(preparing=1, profile=careful) == pytest.approx(26)


def test_nobody_who_was_let_in_is_made_late() -> None:
    """The other has 15 ms: both together take 12, one after the other 20."""
    assert least_budget_ms(due(15)) == 12
    assert least_budget_ms(due(11)) == 20, "the newcomer runs behind him"
    assert least_budget_ms(due(16, 4)) == 26
    assert least_budget_ms(due(9)) == 10, "who is late already"


def test_a_pinned_neighbour_is_counted_at_his_width_and_at_his_place() -> None:
    assert least_budget_ms(due(1000, widths=(WIDE,))) == 10, "the newcomer runs before him"
    assert least_budget_ms(due(49, widths=(WIDE,))) == 50, "or behind him, who has no 50 ms"
    assert least_budget_ms(due(1000), widths=(WIDE,)) == 40


def test_a_pinned_image_that_can_wait_keeps_nobody_out() -> None:
    """Twelve batches of four take 192 ms, with or without nine who are in no hurry."""
    for pinned in ([], due(600_000, widths=(WIDE,)), due(600_000, 9, widths=(WIDE,))):
        assert newcomer_fits([*due(200, 47), *pinned], 200)
        assert not newcomer_fits([*due(200, 48), *pinned], 200)


def test_those_being_decoded_are_taken_to_be_such_as_those_who_wait() -> None:
    """One in four is pinned, so that four take a quarter of 64 ms and three quarters of 16."""
    pinned, others = due(1000, 1, widths=(WIDE,)), due(1000, 2)
    assert least_budget_ms([*pinned, *others], preparing=4) == 38  # 28, and 10 of its own


def test_nobody_is_let_in_for_widths_that_are_not_on_offer() -> None:
    assert least_budget_ms(widths=(WIDE,), profile=make_profile(widths=(NARROW, MIDDLE))) == math.inf
