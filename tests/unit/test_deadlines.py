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
    margin_s,
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
    ("kinds", "sizes_ms"),
    [
        ([ALL], [(4, 16), (2, 12), (1, 10)]),
        ([(MIDDLE, WIDE)], [(4, 32), (2, 24), (1, 20)]),
        ([ALL, (MIDDLE,)], [(4, 32), (2, 24), (1, 20)]),
        ([(WIDE,), ALL, (NARROW,)], [(4, 64), (2, 48), (1, 40)]),
        ([], []),
    ],
)
def test_a_queue_is_counted_at_the_slowest_width_that_somebody_needs(
    kinds: Sequence[tuple[Width, ...]], sizes_ms: Sequence[tuple[int, float]]
) -> None:
    assert in_ms(sizes_for(kinds, IDLE, PROFILE)) == sizes_ms


def test_each_batch_takes_its_median_times_interference_and_its_hop() -> None:
    sizes = sizes_for([ALL], Load(interference=2.0, hop_s=0.001, respond_s=9.0), make_profile(samples=1))
    assert in_ms(sizes) == [(4, 33), (2, 25), (1, 21)]


def test_a_width_that_is_not_on_offer_slows_nobody_down() -> None:
    profile = make_profile(widths=(NARROW, MIDDLE))
    assert in_ms(sizes_for([ALL, (WIDE,)], IDLE, profile)) == [(4, 16), (2, 12), (1, 10)]
    assert sizes_for([(WIDE,)], IDLE, profile) == ()


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


def test_a_newcomer_fits_where_neither_he_nor_who_waits_is_late() -> None:
    waiting = seconds(16.1, 16.1, 16.1)
    assert fits(waiting, 0.0161, 0.0, SIZES)
    assert not fits(waiting, 0.0159, 0.0, SIZES), "with him the others would be late"
    assert not fits([*waiting, 0.0161], 0.0161, 0.0, SIZES), "the fifth"
    assert not fits([*waiting, 0.0161], 0.0259, 0.0, SIZES)
    assert fits([*waiting, 0.0161], 0.0262, 0.0, SIZES), "behind the batch of four"


def test_who_is_late_in_any_case_is_no_obstacle() -> None:
    assert fits(seconds(5, 9.9), 0.0101, 0.0, SIZES)
    assert not fits(seconds(5, 10.1), 0.0101, 0.0, SIZES), "this one is not lost yet"


def test_whoever_cannot_be_in_time_alone_does_not_fit() -> None:
    assert not fits([], 0.0099, 0.0, SIZES)
    assert not fits([], 0.0101, 0.001, SIZES)


@pytest.mark.parametrize(
    ("images", "ms"), [(0, 0), (1, 10), (2, 12), (3, 16), (4, 16), (5, 26), (6, 28), (7, 32), (8, 32)]
)
def test_few_images_are_not_taken_for_a_whole_batch(images: int, ms: float) -> None:
    assert work_s(images, SIZES) == pytest.approx(ms / 1000)


@pytest.mark.parametrize(("waiting", "ms"), [(1, 5), (2, 6), (3, 8), (4, 8), (16, 16), (36, 24)])
def test_the_margin_grows_with_the_root_of_how_many_batches_there_are(waiting: int, ms: float) -> None:
    """One, two or four take 10, 12 or 16 ms in the median and half as much longer in one of a hundred runs."""
    careful = make_profile(samples=1)
    assert margin_s(waiting, NARROW, IDLE, careful) == pytest.approx(ms / 1000)
    assert margin_s(waiting, NARROW, Load(interference=2.0), careful) == pytest.approx(2 * ms / 1000)
    assert margin_s(waiting, NARROW, IDLE, PROFILE) == pytest.approx(0)


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


def test_a_pinned_neighbour_is_counted_at_his_width() -> None:
    assert least_budget_ms(due(1000, widths=(WIDE,))) == 40
    assert least_budget_ms(due(1000), widths=(WIDE,)) == 40


def test_nobody_is_let_in_for_widths_that_are_not_on_offer() -> None:
    assert least_budget_ms(widths=(WIDE,), profile=make_profile(widths=(NARROW, MIDDLE))) == math.inf
