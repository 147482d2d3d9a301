"""Each baseline on a schedule worked out by hand, in ticks. Profile, as in ``simulated.py``, p50 = p99:

    N, width 0.25 (accuracy 0.5):  10, 12, 14, 16 ticks for 1 to 4 images
    M, width 0.5  (accuracy 0.6):  20, 24, 28, 32
    W, width 1    (accuracy 0.7):  40, 48, 56, 64

A request is (arrival, budget), a batch (start, width, images); each request ends with the instant of its answer,
"refused" or "dropped". Requests that come before the device is free are there when it is.
"""

from __future__ import annotations

import random

import pytest

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.simulation.baselines import Tuning, schedulers, switching_table, tunings
from server.simulation.baselines.table import table_of
from server.simulation.baselines.variable_width import Cheapest
from server.simulation.simulator import Scheduler, simulate
from server.simulation.workload import Workload
from tests.unit.simulated import (
    IDEAL,
    MIDDLE,
    NARROW,
    TICK_S,
    TICKS,
    WIDE,
    Exact,
    frontend,
    make_profile,
    played,
    traffic,
)

N, M, W = NARROW, MIDDLE, WIDE
PROFILE, START = make_profile(), Tuning()
NAMES = [*schedulers(PROFILE, tuning=START)]


def make(name: str, tuning: Tuning = START, max_images: int = 256) -> Scheduler:
    return schedulers(PROFILE, tuning=tuning, max_images=max_images)[name]()


# -- one width


def test_fixed_takes_whoever_waits_and_drops_nobody() -> None:
    """At 20, five wait; the first four run until 52, the second of them too, who wanted an answer by 36."""
    batches, ends = played(make("F-0.5"), (0, 100), (5, 100), (6, 30), (7, 100), (8, 100), (9, 100))
    assert batches == [(0, M, 1), (20, M, 4), (52, M, 1)]
    assert ends == [20, 52, 52, 52, 52, 72]


def test_delayed_waits_for_a_full_batch_or_until_the_oldest_has_waited() -> None:
    """A delay of 30: the first two run at 30, until 42; the four of 50 to 53 when they are four.

    At 130 those of 100 are ripe. One wanted an answer by 120, and is dropped now; the other wants it by 132, which
    nobody looks at: it is run until 140.
    """
    requests = [(0, 99), (10, 99), (50, 99), (51, 99), (52, 99), (53, 99), (100, 20), (100, 32)]
    batches, ends = played(make("TR-0.25", Tuning(delay_s=30 * TICK_S)), *requests)
    assert batches == [(30, N, 2), (53, N, 4), (130, N, 1)]
    assert ends == [42, 42, 69, 69, 69, 69, "dropped", 140]


def test_delayed_goes_on_waiting_when_the_oldest_is_dropped() -> None:
    """At 30 the first is dropped, and the second has waited for 25."""
    batches, ends = played(make("TR-0.25", Tuning(delay_s=30 * TICK_S)), (0, 20), (5, 99))
    assert (batches, ends) == ([(35, N, 1)], ["dropped", 45])


def test_aimd_grows_by_one_and_shrinks_by_a_tenth() -> None:
    """18 come at 0 and want answers by 50. At most 1, 2, 3, 4: until 10, 22, 38, 54, the last of them late.

    Then at most 3.6 (until 70), 3.24 (until 86), 2.916 (until 98), all late, and 2.6244. At 200 four come; the first
    is alone, and on time at 210: at most 3.6244.
    """
    batches, ends = played(make("C+-0.25"), *[(0, 50)] * 18, *[(200, 99)] * 4)
    starts = (0, 10, 22, 38, 54, 70, 86, 200, 210)
    assert batches == [(at, N, size) for at, size in zip(starts, (1, 2, 3, 4, 3, 3, 2, 1, 3), strict=True)]
    assert ends[-8:] == [86, 86, 98, 98, 210, 226, 226, 226]


def test_aimd_never_asks_for_less_than_one_nor_more_than_the_largest() -> None:
    """Late at once: still 1. On time four times, at most 4 after the third; of eight that then come, 1, 4 and 3 run."""
    late, ends = played(make("C+-0.25"), (0, 5), (1, 5), (2, 5))
    assert (late, ends) == ([(0, N, 1), (10, N, 1), (20, N, 1)], [10, 20, 30])
    calm = [(100 * i, 99) for i in range(6)]
    batches, _ = played(make("C+-0.25"), *calm, *[(600, 99)] * 8)
    assert batches[-3:] == [(600, N, 1), (610, N, 4), (626, N, 3)]


def test_clockwork_grows_while_all_are_in_time_and_drops_who_cannot_be() -> None:
    """At 20, deadlines are 101, 102, 50 and 104. Two take until 44, which is fine; four until 52, which is not.

    At 44 the third could not be in time even alone (64).
    """
    batches, ends = played(make("CW-0.5"), (0, 100), (1, 100), (2, 100), (3, 47), (4, 100))
    assert batches == [(0, M, 1), (20, M, 2), (44, M, 1)]
    assert ends == [20, 44, 44, "dropped", 64]


def test_clockwork_runs_measured_sizes() -> None:
    """Of three, two."""
    batches, _ = played(make("CW-0.5"), (0, 100), (1, 100), (2, 100), (3, 100))
    assert batches == [(0, M, 1), (20, M, 2), (44, M, 1)]


def test_clockwork_believes_its_last_batches() -> None:
    """A window of one: after a batch of 60 an image is believed to take 60, too long for a budget of 50, not for 61.

    That one takes 20 again, and so does the next, in time for a budget of 25.
    """
    requests = [(0, 100), (100, 50), (200, 61), (300, 25)]
    batches, ends = played(make("CW-0.5", Tuning(window=1)), *requests, device=Exact(3))
    assert batches == [(0, M, 1), (200, M, 1), (300, M, 1)]
    assert ends == [60, "dropped", 220, 320]


def test_clockwork_believes_the_99th_percentile_of_its_last_batches() -> None:
    """The profile's 20, one batch of 60, and batches of 20. Of 99 the 99th percentile is the largest (0.99 x 99 =
    98.01, rounded up), of 100 the 99th: then a budget of 50 is enough again."""
    for num_calm, end in ((0, "dropped"), (97, "dropped"), (98, 100 * 99 + 20)):
        calm = [(100 * i, 99) for i in range(1 + num_calm)]
        requests = [*calm, (100 * (1 + num_calm), 50)]
        _, ends = played(make("CW-0.5", Tuning(window=200)), *requests, device=Exact(3))
        assert ends[-1] == end, num_calm


def test_admission_refuses_who_is_predicted_to_be_late() -> None:
    """While the first runs until 20: the second is predicted for 40 and wants 40; the third, in a batch of two, for 44,
    and wants 43; the fourth likewise, and wants 44. That it joins the second's batch makes the second late."""
    batches, ends = played(make("AS-0.5"), (0, 100), (1, 39), (2, 41), (3, 41))
    assert (batches, ends) == ([(0, M, 1), (20, M, 2)], [20, 44, "refused", 44])


def test_admission_counts_the_full_batches_that_are_ahead() -> None:
    """Four wait at 5: until 52 they keep the device, and one more would be done at 72."""
    batches, ends = played(make("AS-0.5"), (0, 100), *[(i, 99) for i in (1, 2, 3, 4)], (5, 66), (6, 66))
    assert batches == [(0, M, 1), (20, M, 4), (52, M, 1)]
    assert ends == [20, 52, 52, 52, 52, "refused", 72]


# -- the queue that is the same for all


def test_the_strongest_fixed_width() -> None:
    """Deadlines in the order of arrival: 25, 91, 43, 45, 204. While the first runs until 20, the queue is 43, 91.

    The fourth is refused: 43 leaves no time for two (44), and behind it the fourth would be done at 60. At 20, of 43,
    91 and 204 the first runs alone, since with the second it would be late; then the others, 40 to 64.
    """
    batches, ends = played(make("F-0.5+EDF"), (0, 25), (1, 90), (2, 41), (3, 42), (4, 200))
    assert batches == [(0, M, 1), (20, M, 1), (40, M, 2)]
    assert ends == [20, 64, 40, "refused", 64]


def test_what_the_width_cannot_do_is_refused_at_once() -> None:
    assert played(make("F-0.5+EDF"), (0, 19), (50, 20)) == ([(50, M, 1)], ["refused", 70])


def test_early_drop_spends_no_time_on_whom_it_would_not_help() -> None:
    """Instead of 20 the first batch takes 60. The second was let in for 61 and would be done at 80: dropped. The
    third was let in for just that."""
    batches, ends = played(make("F-0.5+EDF"), (0, 25), (1, 60), (2, 78), device=Exact(3))
    assert (batches, ends) == ([(0, M, 1), (60, M, 1)], [60, "dropped", 80])


def test_a_rule_that_waits_may_wait_too_long() -> None:
    """Let in for 139; at 130, when it is ripe, it could be done at 140."""
    batches, ends = played(make("TR-0.25+EDF", Tuning(delay_s=30 * TICK_S)), (0, 99), (10, 99), (100, 39))
    assert (batches, ends) == ([(30, N, 2)], [42, 42, "dropped"])


@pytest.mark.parametrize("name", NAMES)
def test_a_full_queue_refuses(name: str) -> None:
    """All bounds are 2: one runs, two wait, and the fourth of those who come together is refused."""
    assert played(make(name, TUNED, 2), *[(0, 9999)] * 4)[1].index("refused") == (2 if name[:2] == "TR" else 3)


def test_who_is_being_decoded_has_a_place_in_the_queue() -> None:
    """Done at 15 and 30; the third finds both places taken at 2, the fourth one free at 16."""
    requests = (0, 99), (1, 99), (2, 99), (16, 99)
    _, ends = played(make("F-0.25", max_images=2), *requests, front=frontend(decode=15))
    assert ends == [25, 40, "refused", 55]


# -- widths by deadline


def test_the_cheapest_is_the_narrowest_whatever_time_there_is() -> None:
    batches, ends = played(make("INF-0"), (0, 9999), (1, 9999), (2, 9999))
    assert (batches, ends) == ([(0, N, 1), (10, N, 2)], [10, 22, 22])


def test_the_cheapest_above_a_floor() -> None:
    """A floor of 0.58 rules out N. At 20 the next wants 31, which no batch reaches: it is run with the one behind it.

    At 120 the second of three wants 146: two take until 144, three until 148.
    """
    requests = [(0, 100), (1, 30), (2, 90), (100, 100), (101, 100), (102, 44), (103, 100)]
    batches, ends = played(make("INF-a", Tuning(floor=0.4)), *requests)
    assert batches == [(0, M, 1), (20, M, 2), (100, M, 1), (120, M, 2), (144, M, 1)]
    assert ends == [20, 44, 44, 120, 144, 144, 164]
    assert played(make("INF-a+EDF", Tuning(floor=0.4)), *requests)[1][:3] == [20, "refused", 40]


def test_a_floor_spans_the_accuracies() -> None:
    for floor, width in ((0, N), (0.45, M), (0.55, W), (1, W)):
        assert played(make("INF-a", Tuning(floor=floor)), (0, 100))[0][0][1] == width


def test_the_cheapest_that_is_in_time() -> None:
    """For four, 8 ticks an image at the narrow width and 12 at the wide one; alone, 30 and 20."""
    profile = LatencyProfile({Width(0.5): 0.5, Width(1): 0.6}, 4)
    for width, ticks in zip(profile.widths, ((30, 31, 32), (20, 24, 48)), strict=True):
        for batch, taken in zip((1, 2, 4), ticks, strict=True):
            profile.record(width, batch, [taken] * 20)
    rule = Cheapest(table_of(profile), 0.5)
    assert rule.choose([31.0, 31.0, 90.0], 0, 0) == (0, 2)
    assert rule.choose([29.0, 40.0], 0, 0) == (1, 2)
    assert rule.choose([19.0, 40.0], 0, 0) == (0, 2)


LATER = [(0, 100), (1, 89), (2, 98), (3, 107)]  # at 40 deadlines are 90, 100 and 110: 50 are left


def test_accuracy_first() -> None:
    """Alone, W until 40. Then W for two takes 48, for three 64; at 88 the last has 22: M."""
    assert played(make("MA"), *LATER) == ([(0, W, 1), (40, W, 2), (88, M, 1)], [40, 88, 88, 108])


def test_batch_first() -> None:
    """Alone, W until 40. Then N and M can take all three, in 16 and 32."""
    assert played(make("MB"), *LATER) == ([(0, W, 1), (40, M, 3)], [40, 72, 72, 72])


@pytest.mark.parametrize("name", ["MA", "MB"])
def test_the_earliest_deadline_first(name: str) -> None:
    """At 40 the one who came last has 22 left. MA spends them on M for it alone, MB on N for both."""
    batches, ends = played(make(name), (0, 100), (1, 500), (2, 60))
    expected = {
        "MA": ([(0, W, 1), (40, M, 1), (60, W, 1)], [40, 100, 60]),
        "MB": ([(0, W, 1), (40, N, 2)], [40, 52, 52]),
    }
    assert (batches, ends) == expected[name]


@pytest.mark.parametrize("name", ["MA", "MB", "SF-a", "SF-b"])
def test_the_late_are_run_in_the_native_queue_and_refused_in_the_other(name: str) -> None:
    """At 40 the first has 5 left: no pair is in time, and both run at N. Refused, the second has 60, enough for W."""
    requests = (0, 41), (1, 44), (2, 98)
    assert played(make(name), *requests) == ([(0, W, 1), (40, N, 2)], [40, 52, 52])
    assert played(make(name + "+EDF"), *requests) == ([(0, W, 1), (40, W, 1)], [40, "refused", 80])


# Of three buckets, 10, 12, 16, 20 and 24 are in the first (up to 28), 32 and 40 in the second (to 46), 48 and 64 in the
# third.
SLACK = [(0, 100), (1, 84), (2, 108), (3, 109), (4, 116)]  # at 40 deadlines are 85, 110, 112, 120: 45 are left


def test_slackfit_by_batch() -> None:
    """The second bucket, which lasts 40, has M for four (32) and W for one (40)."""
    assert played(make("SF-b", Tuning(buckets=3)), *SLACK) == ([(0, W, 1), (40, M, 4)], [40, 72, 72, 72, 72])


def test_slackfit_by_accuracy() -> None:
    """At 40, W for one. At 80, 30 are left: the first bucket, which lasts 24, has M for two as its most accurate.

    At 104, 16 are left to the last: of the pairs for one, the first bucket lasts 20, so that N is hurried.
    """
    batches, ends = played(make("SF-a", Tuning(buckets=3)), *SLACK)
    assert batches == [(0, W, 1), (40, W, 1), (80, M, 2), (104, N, 1)]
    assert ends == [40, 80, 104, 104, 114]


@pytest.mark.parametrize("name", ["SF-a", "SF-b"])
def test_below_all_buckets_slackfit_hurries(name: str) -> None:
    """At 40, 13 are left, and a single bucket lasts 64: N takes 12 for two, 14 for three."""
    batches, ends = played(make(name, Tuning(buckets=1)), (0, 100), (1, 52), (2, 98), (3, 97))
    assert (batches, ends) == ([(0, W, 1), (40, N, 2), (52, W, 1)], [40, 52, 52, 92])


@pytest.mark.parametrize("name", ["SF-a", "SF-b"])
def test_few_buckets_fit_the_slack_badly(name: str) -> None:
    """One image has 10, 20 or 40. A single bucket lasts 40; of sixteen, the second last below 39 lasts 20."""
    for buckets, budget, width in ((1, 39, N), (1, 40, W), (16, 39, M), (16, 19, N), (16, 40, W)):
        assert played(make(name, Tuning(buckets=buckets)), (0, budget))[0] == [(0, width, 1)]


def test_slackfit_leaves_out_pairs_that_the_queue_cannot_fill() -> None:
    """45 left to one image: not M for four, though that is the largest batch of its bucket."""
    assert played(make("SF-b", Tuning(buckets=3)), (0, 45))[0] == [(0, W, 1)]


# -- widths by load

TUNED = Tuning(switching=((3.0, WIDE), (6.0, MIDDLE)))


def test_switching_follows_the_rate_of_the_last_second() -> None:
    """A second is 1024 ticks. Arrivals: 4, so M; 3, so W; 7, more than the table has, so M; 1, so W; none, W."""
    seconds = [
        ([0, 100, 200, 300], W),
        ([1024, 1100, 2047], M),
        ([2100, 2200, 2300, 2400, 2500, 2600, 2700], W),
        ([3100], M),
        ([5120], W),
    ]
    batches, _ = played(make("MS", TUNED), *[(at, 999) for arrivals, _ in seconds for at in arrivals])
    assert batches == [(at, width, 1) for arrivals, width in seconds for at in arrivals]


def test_switching_judges_who_comes_at_the_width_of_the_moment_and_counts_the_refused() -> None:
    """None of four has time for W. In the next second it is M, of which 30 are enough and 19 are not."""
    requests = [(0, 30), (100, 30), (200, 30), (300, 30), (1100, 30), (1200, 19)]
    batches, ends = played(make("MS+EDF", TUNED), *requests)
    assert (batches, ends) == ([(1100, M, 1)], [*["refused"] * 4, 1120, "refused"])


def test_bands_step_down_when_busy_and_up_when_idle_and_stay_between() -> None:
    """Every 100 ticks; busy for more than 65: down, for less than 30: up.

    W is busy for 80, so M; for 40: M stays; for 20: W. Then 40 and, of a batch from 380 to 420, 20: W stays; 20 and 40:
    W stays. 80, so M; four times 20, so N; 10, and then none: M and W again by 900.
    """
    widths = {W: [0, 50], M: [100, 130, 200]}
    later = [
        (300, W),
        (380, W),
        (440, W),
        (500, W),
        (541, W),
        (600, M),
        (620, M),
        (640, M),
        (660, M),
        (700, N),
        (950, W),
    ]
    expected = [(at, width) for width, starts in widths.items() for at in starts] + later
    tuning = Tuning(low=0.3, high=0.65, period_s=100 * TICK_S)
    batches, _ = played(make("TH", tuning), *[(at, 9999) for at, _ in expected])
    assert batches == [(at, width, 1) for at, width in expected]


def test_the_bands_ladder_leaves_out_who_costs_more_for_less() -> None:
    """A width of accuracy 0.55 that costs more than the one of 0.6 is no step between others."""
    profile = LatencyProfile({Width(0.25): 0.5, Width(0.375): 0.55, Width(0.5): 0.6, Width(1): 0.7}, 1)
    for width, seconds in zip(profile.widths, (1, 3, 2, 4), strict=True):
        profile.record(width, 1, [seconds] * 20)
    assert table_of(profile).ladder() == (0, 2, 3)


def test_the_table_for_switching_has_the_best_width_of_each_rate() -> None:
    """One at a time: in time at every width, at 20 a piece, at 10 a piece."""
    loads = {
        30.0: traffic(*[(20 * i, 45) for i in range(20)]),
        10.0: traffic(*[(100 * i, 50) for i in range(20)]),
        70.0: traffic(*[(10 * i, 15) for i in range(20)]),
    }
    table = switching_table(PROFILE, loads, loads.__getitem__, Exact(), IDEAL, edf=False)
    assert table == ((10.0, W), (30.0, M), (70.0, N))


def test_the_table_for_switching_depends_on_the_queue() -> None:
    """W can do what comes but for one. Dropping nobody, it is late for ever; refusing one, it is worth 0.7 x 20/21."""

    def workload_at(rate: float) -> Workload:
        return traffic((0, 45), (1, 45), *[(40 * i, 45) for i in range(1, 20)])

    assert switching_table(PROFILE, [5.0], workload_at, Exact(), IDEAL, edf=False) == ((5.0, M),)
    assert switching_table(PROFILE, [5.0], workload_at, Exact(), IDEAL, edf=True) == ((5.0, W),)


# -- all


def test_the_names() -> None:
    fixed = {f"{rule}-{width}" for rule in ("F", "TR", "C+", "CW", "AS") for width in ("0.25", "0.5", "1")}
    others = {"INF-0", "INF-a", "MS", "TH", "MA", "MB", "SF-a", "SF-b"}
    with_edf = {f"{name}+EDF" for name in fixed | others if not name.startswith("AS")}
    assert set(NAMES) == fixed | others | with_edf


def crowd(seed: int) -> Workload:
    """200 requests that ask for 10 to 30 ticks each on average, with 10 to 200 to spare."""
    chance = random.Random(seed)
    arrivals = sorted(chance.randrange(2000 * (1 + seed % 3)) for _ in range(200))
    return traffic(*[(at, chance.randrange(5, 200)) for at in arrivals])


@pytest.mark.parametrize("name", NAMES)
def test_no_image_is_lost_or_run_twice_and_the_other_queue_is_never_late(name: str) -> None:
    for seed in range(3):
        workload = crowd(seed)
        outcome = simulate(workload, make(name, TUNED), Exact())
        answered = outcome.width >= 0
        assert sum(run.images for run in outcome.runs) == answered.sum()
        assert not (answered & outcome.refused).any()
        assert all(run.predicted_s == TICKS[run.width][run.images] * TICK_S for run in outcome.runs)
        if name.endswith("+EDF"):
            assert (outcome.finished_s <= workload.deadlines_s)[answered].all()
        if name.startswith("F-") and name.endswith("+EDF"):
            assert (answered | outcome.refused).all(), "who is let in is answered"
        if name[:2] in ("F-", "C+", "IN", "MS", "TH", "MA", "MB", "SF", "AS") and not name.endswith("+EDF"):
            assert (answered | outcome.refused).all(), "nobody is dropped"


@pytest.mark.parametrize("name", NAMES)
def test_a_maker_makes_a_scheduler_that_knows_nothing_of_the_last_run(name: str) -> None:
    maker = schedulers(PROFILE, tuning=TUNED)[name]
    first, second = (simulate(crowd(0), maker(), Exact()) for _ in range(2))
    assert first.runs == second.runs


def test_whoever_goes_on_measuring_changes_no_baseline() -> None:
    profile = make_profile()
    maker = schedulers(profile, tuning=Tuning())["MA+EDF"]
    for batch in (1, 2, 4):
        profile.record(Width(1), batch, [9.0] * 200)
    assert played(maker(), (0, 40)) == ([(0, W, 1)], [40])


def test_what_is_tried_for_each_rule() -> None:
    start = Tuning(delay_s=0.004, switching=((1.0, 0),))
    assert tunings("F-0.5+EDF", start) == tunings("MA", start) == tunings("INF-0", start) == (start,)
    tried = {"TR-1": "delay_s", "CW-0.5+EDF": "window", "INF-a": "floor", "TH+EDF": "period_s", "SF-b": "buckets"}
    for name, parameter in tried.items():
        assert len({getattr(tuning, parameter) for tuning in tunings(name, start)}) > 2
        assert {tuning.switching for tuning in tunings(name, start)} == {start.switching}
    assert all(tuning.delay_s == 0.004 for tuning in tunings("SF-a+EDF", start))


# -- refusals


def test_what_cannot_be_is_refused() -> None:
    for wrong, sentence in (
        ({"delay_s": -1}, "a delay of -1 s: give 0 to 60"),
        ({"window": 0}, "a window of 0 batches: give 1 or more"),
        ({"floor": 1.5}, "a floor of 1.5: give a share of the accuracies' range, 0 to 1"),
        ({"low": 0.8, "high": 0.8}, "bands 0.8 to 0.8: let 0 <= low < high <= 1"),
        ({"period_s": 0}, "a period of 0 s: give a number above 0"),
        ({"buckets": 0}, "0 buckets: give 1 or more"),
        ({"switching": ((2.0, 0), (1.0, 1))}, "let the rates ascend"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Tuning(**wrong)
    with pytest.raises(ValueError, match="a queue of 0 images lets nobody in"):
        schedulers(PROFILE, tuning=Tuning(), max_images=0)
    with pytest.raises(ValueError, match=r"MS knows no width for any rate: give Tuning.switching"):
        make("MS")


def test_a_profile_without_a_width_is_refused() -> None:
    profile = LatencyProfile({Width(0.5): 0.5, Width(1): 0.6}, 4)
    profile.record(Width(1), 1, [1.0])
    with pytest.raises(ValueError, match=r"the profile has no batch of width 0.5: measure it, or leave the width out"):
        schedulers(profile, tuning=Tuning())
