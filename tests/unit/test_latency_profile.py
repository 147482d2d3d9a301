"""The latency profile: cells, what lies between them, what is on offer, and how slowly it changes its mind."""

from __future__ import annotations

import random

import pytest

from scala_model.width import Width
from server.latency_profile import SAMPLES, LatencyProfile, Row, buckets_up_to

NARROW, MIDDLE, WIDE = Width(0.25), Width(0.5), Width(1.0)
MEASURED = {NARROW: 0.5, MIDDLE: 0.6, WIDE: 0.7}


def profile_of(*cells: tuple[Width, int, float], max_batch: int = 16) -> LatencyProfile:
    """Cells of (width, batch, seconds) with enough equal samples that p99 = p50 = seconds."""
    profile = LatencyProfile(MEASURED, max_batch)
    for width, batch, seconds in cells:
        profile.record(width, batch, [seconds] * 20)
    return profile


# -- cells


@pytest.mark.parametrize(
    ("max_batch", "buckets"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (16, (1, 2, 4, 8, 16)), (24, (1, 2, 4, 8, 16, 24))],
)
def test_buckets_are_powers_of_two_and_the_largest_batch(max_batch: int, buckets: tuple[int, ...]) -> None:
    assert buckets_up_to(max_batch) == buckets


def test_p99_is_half_again_the_median_until_there_are_20_samples() -> None:
    profile = LatencyProfile(MEASURED, 1)
    profile.record(WIDE, 1, [0.010] * 19)
    assert profile.p99(WIDE, 1) == pytest.approx(0.015)
    profile.record(WIDE, 1, [0.010])
    assert profile.p99(WIDE, 1) == profile.p50(WIDE, 1) == 0.010


def test_median_and_p99_of_many_samples() -> None:
    profile = LatencyProfile(MEASURED, 1)
    profile.record(WIDE, 1, [ms / 1000 for ms in range(1, 201)])
    assert profile.p50(WIDE, 1) == pytest.approx(0.1005)
    assert profile.p99(WIDE, 1) == pytest.approx(0.198)


def test_between_two_buckets_it_is_the_upper_one_or_the_lower_one_and_the_rest_by_itself() -> None:
    """Three as two and one, five as four and one, six as four and two; seven take 28 + 28 and so the 52 of eight."""
    profile = profile_of((WIDE, 1, 0.010), (WIDE, 2, 0.016), (WIDE, 4, 0.028), (WIDE, 8, 0.052))
    assert [round(1000 * profile.p50(WIDE, batch), 9) for batch in range(1, 9)] == [10, 16, 26, 28, 38, 44, 52, 52]
    assert profile.p99(WIDE, 3) == pytest.approx(0.026)


def test_where_batches_are_free_all_between_two_buckets_take_as_long_as_the_upper_one() -> None:
    profile = profile_of((WIDE, 1, 0.010), (WIDE, 2, 0.011), (WIDE, 4, 0.012), (WIDE, 8, 0.014))
    assert [round(1000 * profile.p50(WIDE, batch), 9) for batch in range(1, 9)] == [10, 11, 12, 12, 14, 14, 14, 14]


def test_a_larger_batch_is_never_believed_to_be_faster_than_the_bucket_below_it() -> None:
    profile = profile_of((WIDE, 1, 0.010), (WIDE, 2, 0.020), (WIDE, 4, 0.016))
    assert profile.p50(WIDE, 3) == 0.020


def test_a_width_that_was_never_evaluated_counts_as_accurate_as_it_is_wide() -> None:
    profile = LatencyProfile({WIDE: None, NARROW: 0.4, MIDDLE: None}, 1)
    assert profile.accuracy == {NARROW: 0.4, MIDDLE: 0.5, WIDE: 1.0}
    assert profile.widths == (NARROW, MIDDLE, WIDE)


# -- what is on offer


def test_nothing_is_on_offer_before_it_is_warmed() -> None:
    profile = profile_of((NARROW, 1, 0.010), max_batch=4)
    assert (profile.ready(NARROW), profile.warmed(NARROW), profile.max_batch(NARROW)) == (True, (1,), 1)
    assert (profile.ready(WIDE), profile.warmed(WIDE), profile.max_batch(WIDE)) == (False, (), 0)
    assert profile.cell(WIDE, 1) is None


def test_batches_beyond_a_gap_are_not_on_offer() -> None:
    profile = profile_of((WIDE, 1, 0.01), (WIDE, 2, 0.02), (WIDE, 8, 0.08))
    assert (profile.warmed(WIDE), profile.max_batch(WIDE)) == ((1, 2), 2)
    profile.record(WIDE, 4, [0.04])
    assert (profile.warmed(WIDE), profile.max_batch(WIDE)) == ((1, 2, 4, 8), 8)


def test_a_width_without_batch_1_is_not_ready() -> None:
    profile = profile_of((WIDE, 2, 0.02))
    assert not profile.ready(WIDE)
    assert profile.warmed(WIDE) == ()


def test_what_is_withdrawn_is_off_the_offer_until_it_is_recorded_again() -> None:
    cells = ((width, batch, 0.01 * batch * float(width)) for width in (NARROW, WIDE) for batch in (1, 2, 4, 8))
    profile = profile_of(*cells, max_batch=8)
    profile.withdraw(WIDE, 3)  # a batch of three ran out of memory
    assert (profile.warmed(WIDE), profile.warmed(NARROW)) == ((1, 2), (1, 2, 4, 8))
    assert profile.cell(WIDE, 8) is None
    profile.record(WIDE, 4, [0.05])
    assert profile.warmed(WIDE) == (1, 2, 4)
    assert profile.p50(WIDE, 4) == 0.05, "what was seen before the memory ran out is forgotten"
    profile.withdraw(WIDE, 16)  # beyond the largest batch: the largest
    profile.withdraw(MIDDLE, 1)  # which was never there
    assert profile.warmed(WIDE) == (1, 2, 4)


def test_a_width_withdrawn_altogether_is_not_ready_nor_the_fastest_nor_dominates() -> None:
    profile = LatencyProfile({NARROW: 0.7, WIDE: 0.7}, 2)
    for width in (NARROW, WIDE):
        profile.record(width, 1, [0.01 * float(width)])
    assert (profile.fastest, profile.dominated_at(1)) == (NARROW, frozenset({WIDE}))
    profile.withdraw(NARROW, 1)
    assert (profile.ready(NARROW), profile.fastest, profile.dominated_at(1)) == (False, WIDE, frozenset())


def test_rows_are_what_is_on_offer_and_follow_every_change() -> None:
    profile = LatencyProfile(MEASURED, 4)
    assert profile.rows(WIDE) == ()
    profile.record(WIDE, 2, [0.020])
    assert profile.rows(WIDE) == (), "not without batch 1"
    profile.record(WIDE, 1, [0.012] * 20)
    assert profile.rows(WIDE) == (Row(1, 0.012, 0.012), Row(2, 0.020, 1.5 * 0.020))
    profile.record(WIDE, 1, [0.016] * 40)
    assert profile.rows(WIDE)[0] == Row(1, 0.016, 0.016)
    assert profile.rows(NARROW) == ()
    profile.withdraw(WIDE, 2)
    assert profile.rows(WIDE) == (Row(1, 0.016, 0.016),)


def test_samples_are_a_copy_of_what_was_recorded() -> None:
    profile = profile_of((NARROW, 1, 0.01))
    profile.record(WIDE, 2, [0.03, 0.02])
    assert profile.samples() == {(NARROW, 1): [0.01] * 20, (WIDE, 2): [0.03, 0.02]}
    profile.samples()[WIDE, 2].append(9.0)
    assert profile.samples()[WIDE, 2] == [0.03, 0.02]


def test_the_best_batch_has_the_least_time_per_image_within_the_limit() -> None:
    profile = profile_of((WIDE, 1, 0.010), (WIDE, 2, 0.012), (WIDE, 4, 0.020), (WIDE, 8, 0.080))
    assert profile.best_batch(WIDE) == 4
    assert profile.seconds_per_image(WIDE) == pytest.approx(0.005)
    assert profile.best_batch(WIDE, 0.020) == 4
    assert profile.best_batch(WIDE, 0.019) == 2
    assert profile.seconds_per_image(WIDE, 0.019) == pytest.approx(0.006)
    assert profile.best_batch(WIDE, 0.011) == 1
    assert profile.best_batch(WIDE, 0.001) == 1  # none fits


def test_the_limit_of_the_best_batch_is_on_p99() -> None:
    profile = LatencyProfile(MEASURED, 2)
    profile.record(WIDE, 1, [0.010])
    profile.record(WIDE, 2, [0.012])  # p99 is 18 ms
    assert profile.best_batch(WIDE, 0.0179) == 1
    assert profile.best_batch(WIDE, 0.0181) == 2


# -- widths that are not worth their time


def test_a_width_that_is_slower_and_not_more_accurate_is_dominated() -> None:
    profile = LatencyProfile({NARROW: 0.6, MIDDLE: 0.5, WIDE: 0.7}, 1)
    for width, seconds in ((NARROW, 0.01), (MIDDLE, 0.02), (WIDE, 0.04)):
        profile.record(width, 1, [seconds])
    assert profile.dominated_at(1) == {MIDDLE}


def test_a_width_that_is_slower_and_more_accurate_is_not_dominated() -> None:
    assert profile_of((NARROW, 1, 0.01), (MIDDLE, 1, 0.02), (WIDE, 1, 0.04)).dominated_at(1) == frozenset()


def test_where_all_take_the_same_time_only_the_most_accurate_is_worthwhile() -> None:
    profile = profile_of((NARROW, 1, 0.01), (MIDDLE, 1, 0.01), (WIDE, 1, 0.01))  # a GPU at batch 1: launches, not sums
    assert profile.dominated_at(1) == {NARROW, MIDDLE}


def test_of_two_equals_the_narrower_stays() -> None:
    profile = LatencyProfile({NARROW: 0.6, MIDDLE: 0.6, WIDE: 0.6}, 1)
    for width in (WIDE, NARROW, MIDDLE):
        profile.record(width, 1, [0.01])
    assert profile.dominated_at(1) == {MIDDLE, WIDE}


def test_of_two_equally_accurate_the_faster_stays_though_it_is_wider() -> None:
    profile = LatencyProfile({NARROW: 0.6, WIDE: 0.6}, 1)
    profile.record(NARROW, 1, [0.02])
    profile.record(WIDE, 1, [0.01])
    assert profile.dominated_at(1) == {NARROW}


def test_among_widths_never_evaluated_the_wider_is_the_better_one() -> None:
    profile = LatencyProfile({NARROW: None, WIDE: None}, 1)
    profile.record(NARROW, 1, [0.02])
    profile.record(WIDE, 1, [0.01])
    assert profile.dominated_at(1) == {NARROW}


def test_only_warmed_widths_dominate_and_are_dominated() -> None:
    profile = LatencyProfile({NARROW: 0.7, WIDE: 0.7}, 1)
    profile.record(WIDE, 1, [0.02])
    assert profile.dominated_at(1) == frozenset()
    profile.record(NARROW, 1, [0.01])
    assert profile.dominated_at(1) == {WIDE}


def test_what_is_dominated_follows_what_is_measured() -> None:
    profile = LatencyProfile({NARROW: 0.6, WIDE: 0.7}, 1)
    profile.record(NARROW, 1, [0.02])
    profile.record(WIDE, 1, [0.01])
    assert profile.dominated_at(1) == {NARROW}
    profile.record(WIDE, 1, [0.04] * 3)
    assert profile.dominated_at(1) == frozenset()


def test_a_width_may_be_worth_its_time_at_large_batches_only() -> None:
    """A GPU: one image takes as long at every width, eight do not."""
    profile = profile_of(*((width, 1, 0.01) for width in MEASURED))
    for width in MEASURED:
        profile.record(width, 8, [0.04 * float(width)])
    assert profile.dominated_at(1) == {NARROW, MIDDLE}
    assert profile.dominated_at(8) == frozenset()
    assert profile.dominated_at(5) == frozenset(), "five are a batch of the bucket of eight"
    assert profile.dominated_at(2) == profile.dominated_at(16) == frozenset(), "nothing was measured there"


def test_a_width_without_the_cell_does_not_dominate_there() -> None:
    profile = LatencyProfile({NARROW: 0.5, WIDE: 0.5}, 2)
    profile.record(NARROW, 1, [0.01])
    profile.record(WIDE, 1, [0.02])
    profile.record(WIDE, 2, [0.03])
    assert profile.dominated_at(1) == {WIDE}
    assert profile.dominated_at(2) == frozenset()


def test_dominated_by_definition_on_many_tables() -> None:
    """Few distinct values, so that there are ties of all kinds."""
    chance = random.Random(0)
    widths = [Width(f"{n}/8") for n in range(1, 9)]
    for _ in range(200):
        accuracy = {width: chance.choice((0.5, 0.6, 0.7)) for width in widths}
        seconds = {width: chance.choice((0.01, 0.02, 0.03)) for width in widths}
        profile = LatencyProfile(accuracy, 4)
        for width in chance.sample(widths, 8):
            profile.record(width, 4, [seconds[width]])
        expected = set()
        for width in widths:
            for other in widths:
                no_worse = accuracy[other] >= accuracy[width] and seconds[other] <= seconds[width]
                equal = accuracy[other] == accuracy[width] and seconds[other] == seconds[width]
                if no_worse and (other < width if equal else other != width):
                    expected.add(width)
        assert profile.dominated_at(4) == expected


def test_the_fastest_width_is_measured_not_assumed() -> None:
    profile = LatencyProfile(MEASURED, 1)
    assert profile.fastest == NARROW  # the best guess before anything was measured
    profile.record(WIDE, 1, [0.03])
    assert profile.fastest == WIDE  # the only one that may be used
    profile.record(NARROW, 1, [0.02])
    assert profile.fastest == NARROW
    profile.record(MIDDLE, 1, [0.01])
    assert profile.fastest == MIDDLE


def test_the_fastest_width_gets_through_the_most_images_in_its_best_batch() -> None:
    profile = profile_of((NARROW, 1, 0.010), (WIDE, 1, 0.020), (NARROW, 2, 0.030), (WIDE, 2, 0.021))
    assert profile.by_speed == (NARROW, WIDE)
    profile.record(WIDE, 2, [0.019] * 100)  # 9.5 ms an image
    assert (profile.fastest, profile.by_speed) == (WIDE, (WIDE, NARROW))
    profile.record(MIDDLE, 1, [0.0097])
    assert list(profile.by_speed) == [WIDE, MIDDLE, NARROW]
    profile.withdraw(WIDE, 2)
    assert list(profile.by_speed) == [MIDDLE, NARROW, WIDE]
    profile.withdraw(MIDDLE, 1)
    assert (profile.fastest, profile.by_speed) == (NARROW, (NARROW, WIDE))


def test_the_order_by_latency_is_that_of_one_image_alone() -> None:
    profile = profile_of((NARROW, 1, 0.0021), (NARROW, 2, 0.0024), (WIDE, 1, 0.0020), (WIDE, 2, 0.0040))
    assert (profile.by_speed, profile.by_latency) == ((NARROW, WIDE), (WIDE, NARROW))
    profile.record(MIDDLE, 1, [0.0019])
    assert profile.by_latency == (MIDDLE, WIDE, NARROW)
    profile.withdraw(WIDE, 1)
    assert list(profile.by_latency) == [MIDDLE, NARROW]


def test_of_two_equally_fast_the_narrower_is_the_faster() -> None:
    profile = profile_of((WIDE, 1, 0.010), (NARROW, 1, 0.010), (MIDDLE, 1, 0.010))
    assert profile.by_speed == profile.by_latency == (NARROW, MIDDLE, WIDE)


# -- refinement while serving


def test_one_slow_batch_changes_nothing() -> None:
    profile = LatencyProfile(MEASURED, 1)
    profile.record(WIDE, 1, [0.010] * SAMPLES)
    profile.record(WIDE, 1, [5.0, 5.0])
    assert profile.p50(WIDE, 1) == profile.p99(WIDE, 1) == 0.010


def test_the_tail_is_believed_before_the_median_is() -> None:
    profile = LatencyProfile(MEASURED, 1)
    profile.record(WIDE, 1, [0.010] * SAMPLES)
    profile.record(WIDE, 1, [0.020] * 3)
    assert (profile.p50(WIDE, 1), profile.p99(WIDE, 1)) == (0.010, 0.020)
    profile.record(WIDE, 1, [0.020] * (SAMPLES // 2))
    assert profile.p50(WIDE, 1) == 0.020


def test_a_profile_forgets_what_is_old_and_stays_small() -> None:
    profile = LatencyProfile(MEASURED, 1)
    profile.record(WIDE, 1, [1.0] * 1000)
    profile.record(WIDE, 1, [0.010] * SAMPLES)
    cell = profile.cell(WIDE, 1)
    assert cell is not None
    assert (len(cell.samples), cell.p50_s, cell.p99_s) == (SAMPLES, 0.010, 0.010)


def test_a_batch_between_two_buckets_does_not_pass_for_the_larger_one() -> None:
    profile = profile_of(*((WIDE, batch, 0.010 * batch) for batch in (1, 2, 4, 8, 16)))
    profile.record(WIDE, 9, [0.090] * SAMPLES)  # as profiled
    assert profile.p50(WIDE, 16) == pytest.approx(0.160)
    assert profile.p50(WIDE, 9) == pytest.approx(0.090)


def test_a_batch_between_two_buckets_tells_of_a_slower_machine() -> None:
    profile = profile_of(*((WIDE, batch, 0.010 * batch) for batch in (1, 2, 4, 8, 16)))
    profile.record(WIDE, 12, [0.150] * SAMPLES)  # 120 ms were expected
    assert profile.p50(WIDE, 16) == pytest.approx(0.200)
