"""What the monitor makes of made-up samples, step by step. No clock: instants are numbers."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.load_monitor import (
    ARRIVALS_TAU_S,
    DELAY_TAU_S,
    DEMAND_TAU_S,
    Allowance,
    DecayingRate,
    LoadMonitor,
    full_width_demand,
)
from server.types import Load

NOW = 5000.0


# -- rates


def test_a_rate_is_the_sum_of_its_decayed_events() -> None:
    chance = random.Random(0)
    events = sorted((NOW + chance.uniform(0, 10), chance.choice((1, 2, 7.5))) for _ in range(200))
    rate = DecayingRate(3.0)
    for at, amount in events:
        rate.add(amount, at)
    for later in (0.0, 1.0, 20.0):
        now = events[-1][0] + later
        assert rate.value(now) == pytest.approx(sum(n / 3 * math.exp((at - now) / 3) for at, n in events))


def test_a_steady_stream_has_its_rate() -> None:
    rate = DecayingRate(0.5)
    for k in range(1000):
        rate.add(1, NOW + k / 100)
    assert rate.value(NOW + 9.995) == pytest.approx(100, rel=0.01)


def test_reading_a_rate_does_not_change_it() -> None:
    rate = DecayingRate(1.0)
    rate.add(5, NOW)
    assert [rate.value(NOW + 1) for _ in range(3)] == [pytest.approx(5 / math.e)] * 3
    assert rate.value(NOW) == 5


def test_a_rate_bears_an_instant_from_before() -> None:
    rate = DecayingRate(1.0)
    rate.add(5, NOW)
    assert rate.value(NOW - 100) == 5


def test_nothing_seen_is_a_rate_of_nothing() -> None:
    assert DecayingRate(1.0).value(NOW) == 0


# -- allowances


def test_an_allowance_follows_a_duration_that_grows() -> None:
    allowance = Allowance()
    seen = []
    for k in range(60):
        allowance.observe(0.010 if k < 20 else 0.050, NOW + k / 1000)
        seen.append(allowance.value_s(NOW + k / 1000))
    assert seen[19] == pytest.approx(0.010, rel=0.05)
    assert seen[20] > 0.025, "the deviation answers at once"
    assert max(seen) > 0.050, "what varies is allowed for"
    assert seen[-1] == pytest.approx(0.050, rel=0.05)


def test_an_allowance_follows_a_duration_that_shrinks() -> None:
    allowance = Allowance()
    for k in range(60):
        allowance.observe(0.050 if k < 20 else 0.001, NOW + k / 1000)
    assert allowance.value_s(NOW + 0.059) < 0.003


def test_an_allowance_forgets() -> None:
    allowance = Allowance()
    allowance.observe(0.100, NOW)
    values = [allowance.value_s(NOW + k * DELAY_TAU_S) for k in range(9)]
    assert values == [pytest.approx(0.100 * math.exp(-k)) for k in range(9)]


@pytest.mark.parametrize("huge", [1.0, 10.0, 600.0])
def test_an_allowance_is_never_stuck(huge: float) -> None:
    """It may be what keeps every request out, and then nothing new is seen to correct it."""
    allowance = Allowance()
    for k in range(10):
        allowance.observe(huge, NOW + k / 100)
    assert allowance.value_s(NOW + 5) < 0.001
    allowance.observe(0.002, NOW + 5)
    assert allowance.value_s(NOW + 5) < 0.004


def test_an_allowance_is_never_negative() -> None:
    chance, allowance, now = random.Random(0), Allowance(), NOW
    for _ in range(500):
        now += chance.choice((0.0, 0.001, 0.1, 3.0))
        allowance.observe(chance.choice((0.0, 0.001, 0.1, 5.0)), now)
        assert allowance.mean_s >= 0
        assert allowance.deviation_s >= 0


def test_small_and_large_bodies_are_told_apart() -> None:
    monitor = LoadMonitor()
    monitor.decode(5_000_000).observe(0.2, NOW)
    monitor.decode(2_000).observe(0.001, NOW)
    assert monitor.decode(1_000).value_s(NOW) == pytest.approx(0.001)
    assert monitor.decode(9_000_000).value_s(NOW) == pytest.approx(0.2)


def test_the_least_overhead_is_the_best_case_seen() -> None:
    monitor = LoadMonitor()
    assert monitor.least_overhead_s(NOW) == 0
    for ms in (9, 2, 5, 30):
        monitor.small.observe(ms / 1000, NOW)
    monitor.hop.observe(0.001, NOW)
    assert monitor.least_overhead_s(NOW) == pytest.approx(0.003)
    monitor.large.observe(0.0001, NOW)
    assert monitor.least_overhead_s(NOW) == pytest.approx(0.003), "a large body is not the best case"
    for k in range(400):
        monitor.hop.observe(0.010, NOW + k / 1000)
    assert monitor.least_overhead_s(NOW) == pytest.approx(0.003), "load does not make anything impossible"


def test_a_bad_start_does_not_keep_everybody_out_for_ever() -> None:
    """Nothing runs, so nothing better is seen: after ten seconds a third of it is believed."""
    monitor = LoadMonitor()
    monitor.respond.observe(0.030, NOW)
    assert monitor.least_overhead_s(NOW + 10) == pytest.approx(0.030 / math.e)


# -- interference


def test_interference_is_one_where_batches_take_what_they_should() -> None:
    monitor = LoadMonitor()
    assert monitor.interference(NOW) == 1
    for k in range(20):
        monitor.ran(0.010, 0.0, 0.0, 0.010, 0.015, NOW + k / 100)
    assert monitor.interference(NOW + 0.2) == pytest.approx(1)


def test_interference_rises_with_every_slow_batch_towards_what_is_observed() -> None:
    monitor, seen = LoadMonitor(), [1.0]
    for k in range(100):
        monitor.ran(0.030, 0.0, 0.0, 0.010, 0.015, NOW + k / 1000)
        seen.append(monitor.interference(NOW + k / 1000))
    assert all(before < after for before, after in pairwise(seen))
    assert seen[1] == pytest.approx(2), "the first in a while is half believed"
    assert seen[-1] == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("every_s", [0.001, 0.04, 0.5])
def test_steady_interference_is_estimated_right_at_any_pace(every_s: float) -> None:
    monitor = LoadMonitor()
    for k in range(200):
        monitor.ran(0.030, 0.0, 0.0, 0.010, 0.015, NOW + k * every_s)
    assert monitor.interference(NOW + 199 * every_s) == pytest.approx(3)


def test_what_was_forgotten_does_not_come_back() -> None:
    monitor = LoadMonitor()
    for k in range(100):
        monitor.ran(0.100, 0.0, 0.0, 0.010, 0.015, NOW + k / 1000)
    assert monitor.interference(NOW + 60) == pytest.approx(1)
    monitor.ran(0.010, 0.0, 0.0, 0.010, 0.015, NOW + 60)
    assert monitor.interference(NOW + 60) == pytest.approx(1)


def test_interference_decays_to_one_when_nothing_runs() -> None:
    monitor = LoadMonitor()
    for k in range(100):
        monitor.ran(0.030, 0.0, 0.0, 0.010, 0.015, NOW + k / 1000)
    seen = [monitor.interference(NOW + 0.1 + k) for k in range(10)]
    assert all(before > after for before, after in pairwise(seen))
    assert seen[0] > 2.5
    assert seen[-1] == pytest.approx(1, abs=0.001)


def test_fast_batches_never_push_interference_below_one() -> None:
    monitor = LoadMonitor()
    for k in range(100):
        monitor.ran(0.005, 0.0, 0.0, 0.010, 0.015, NOW + k / 1000)
    assert monitor.interference(NOW + 0.1) == 1


@pytest.mark.parametrize(
    ("others_cores", "threads", "cores", "expected"),
    [
        (0, 1, 2, 1.0),
        (1, 1, 2, 1.0),  # one core each
        (2, 1, 2, 1.5),  # three threads on two cores
        (4, 4, 4, 2.0),
        (0, 4, 2, 1.0),  # our own threads are part of what was profiled
    ],
)
def test_a_busy_machine_warns_before_the_first_slow_batch(
    others_cores: float, threads: int, cores: float, expected: float
) -> None:
    monitor = LoadMonitor()
    monitor.see_machine(others_cores, threads, cores)
    assert monitor.interference(NOW) == pytest.approx(expected)
    monitor.see_machine(0, threads, cores)
    assert monitor.interference(NOW) == 1


@pytest.mark.parametrize(("throttled", "expected"), [(0.0, 1.0), (0.5, 2.0), (0.75, 4.0), (1.0, 10.0)])
def test_a_container_that_is_throttled_warns_too(throttled: float, expected: float) -> None:
    monitor = LoadMonitor()
    monitor.see_machine(0, 1, 2, throttled)
    assert monitor.interference(NOW) == pytest.approx(expected)


def test_the_worse_of_warning_and_evidence_counts() -> None:
    monitor = LoadMonitor()
    monitor.see_machine(2, 1, 2)
    monitor.ran(0.110, 0.0, 0.0, 0.010, 0.015, NOW)
    assert monitor.interference(NOW) == pytest.approx(6)
    assert monitor.interference(NOW + 10) == pytest.approx(1.5)


# -- arrivals


def test_arrivals_and_demand_are_smoothed_at_their_own_pace() -> None:
    monitor = LoadMonitor()
    monitor.arrived(3, 0.1, 1.0, NOW)
    assert monitor.arrivals.value(NOW) == pytest.approx(3 / ARRIVALS_TAU_S)
    assert monitor.demand.value(NOW) == pytest.approx(3 / DEMAND_TAU_S)
    assert monitor.arrivals.value(NOW + 2) < 0.2, "a burst is forgotten in two seconds"
    assert monitor.demand.value(NOW + 2) > 0.17, "an autoscaler remembers"


def steady(monitor: LoadMonitor, rate: float, seconds: float, start: float = NOW) -> float:
    """Evenly spaced arrivals; the instant of the last."""
    count = int(rate * seconds)
    for k in range(count):
        monitor.arrived(1, 0.1, 1.0, start + k / rate)
    return start + (count - 1) / rate


def test_a_steady_stream_arrives_at_its_rate() -> None:
    monitor = LoadMonitor()
    last = steady(monitor, 200, 5)
    assert monitor.arrival_rate(last) == pytest.approx(200, rel=0.05)


def test_a_burst_is_believed_within_a_tenth_of_a_second() -> None:
    """It takes the half second's mean 0.45 s to show that ten times as many arrive."""
    monitor = LoadMonitor()
    last = steady(monitor, 100, 5)
    last = steady(monitor, 1000, 0.1, last + 0.01)
    assert monitor.arrivals.value(last) < 300
    assert monitor.arrival_rate(last) > 500
    assert monitor.arrival_rate(last + 0.5) < 150, "and as soon forgotten"


def test_a_few_at_once_are_taken_for_chance() -> None:
    """Three images are 30 a second for the last tenth, and a third of that is what surely is no chance."""
    monitor = LoadMonitor()
    for _ in range(3):
        monitor.arrived(1, 0.1, 1.0, NOW)
    assert monitor.burst.value(NOW) == pytest.approx(30)
    assert monitor.arrival_rate(NOW) == pytest.approx(6)  # 30 less twice the root of 30 / 0.2
    lonely = LoadMonitor()
    lonely.arrived(1, 0.1, 1.0, NOW)
    assert lonely.arrival_rate(NOW) == pytest.approx(2), "never less than the last half second shows"


def test_poisson_arrivals_are_hardly_ever_overestimated() -> None:
    """By half, one time in a hundred: what is asked of two standard deviations, and of a mean of fifty arrivals."""
    chance, monitor, now, seen = random.Random(0), LoadMonitor(), NOW, list[float]()
    for _ in range(20_000):
        now += chance.expovariate(100)
        monitor.arrived(1, 0.1, 1.0, now)
        seen.append(monitor.arrival_rate(now))
    seen = sorted(seen[1000:])
    assert seen[len(seen) // 2] == pytest.approx(100, rel=0.1)
    assert seen[int(0.99 * len(seen))] < 150


def test_a_pinned_width_counts_its_own_share_of_demand_and_is_an_arrival_like_any_other() -> None:
    monitor = LoadMonitor()
    monitor.arrived(2, 0.1, 0.25, NOW)
    assert monitor.arrivals.value(NOW) == pytest.approx(2 / ARRIVALS_TAU_S)
    assert monitor.demand.value(NOW) == pytest.approx(0.5 / DEMAND_TAU_S)


def test_the_median_budget_is_that_of_recent_requests() -> None:
    monitor = LoadMonitor()
    assert monitor.median_budget_s() == math.inf
    for budget_s in (0.1, 5.0, 0.2):
        monitor.arrived(1, budget_s, 1.0, NOW)
    assert monitor.median_budget_s() == 0.2
    for _ in range(10_000):
        monitor.arrived(1, 0.05, 1.0, NOW)
    assert monitor.median_budget_s() == 0.05
    assert len(monitor.budgets_s) <= 500


# -- the snapshot, and what goes to metrics


def test_a_snapshot_holds_what_a_policy_may_know() -> None:
    monitor = LoadMonitor()
    assert monitor.load(NOW) == Load()
    monitor.arrived(1, 0.1, 1.0, NOW)
    monitor.ran(0.020, 0.003, 0.0, 0.010, 0.015, NOW)
    monitor.respond.observe(0.002, NOW)
    load = monitor.load(NOW)
    assert (load.arrival_rate, load.interference) == pytest.approx((2.0, 1.5))
    assert (load.hop_s, load.respond_s) == pytest.approx((0.003, 0.002))
    assert monitor.load(NOW) == load


def test_a_slow_hop_is_no_interference() -> None:
    monitor = LoadMonitor()
    monitor.ran(0.010, 0.500, 0.0, 0.010, 0.015, NOW)
    assert monitor.interference(NOW) == pytest.approx(1)
    assert monitor.load(NOW).hop_s == pytest.approx(0.5)


def test_the_expected_accuracy_starts_at_the_first_answer_and_moves_slowly() -> None:
    monitor = LoadMonitor()
    assert monitor.expected_accuracy is None
    monitor.answered(0.7)
    assert monitor.expected_accuracy == 0.7
    monitor.answered(0.5)
    assert monitor.expected_accuracy == pytest.approx(0.69)


def test_the_prediction_error_and_the_busy_share_follow_the_batches() -> None:
    monitor = LoadMonitor()
    for k in range(2000):
        monitor.ran(0.005, 0.0, 0.0, 0.005, 0.010, NOW + k / 100)
    assert monitor.prediction_error == pytest.approx(0.5)
    assert monitor.busy.value(NOW + 20) == pytest.approx(0.5, rel=0.02)


def test_a_mere_suggestion_of_contention_is_no_evidence_of_a_slow_down() -> None:
    """Batches at their usual speed beside busy neighbours: predictions are careful, measurements are left alone."""
    monitor = LoadMonitor()
    monitor.see_machine(3, 1, 2)
    for step in range(100):
        monitor.ran(0.004, 0.0, 0.0, 0.004, 0.004, step * 0.01)
    assert monitor.interference(1.0) == pytest.approx(2.0)
    assert monitor.slowdown(1.0) == pytest.approx(1.0)


# -- the tail


def test_two_in_a_hundred_batches_take_longer_than_the_p99_says() -> None:
    """Latencies spread evenly up to twice the median; the profile's p99 is the median itself."""
    monitor, chance, beyond = LoadMonitor(), random.Random(1), 0
    for k in range(6000):
        observed_s, predicted_s = 0.010 * chance.uniform(0, 2), 0.010 * monitor.load(NOW + k / 100).tail
        beyond += k >= 3000 and observed_s > predicted_s
        monitor.ran(observed_s, 0.0, 0.0, 0.010, predicted_s, NOW + k / 100)
    assert beyond / 3000 == pytest.approx(0.02, abs=0.008)


def test_the_tail_is_forgotten_within_a_minute() -> None:
    monitor = LoadMonitor()
    for _ in range(100):
        monitor.ran(0.1, 0.0, 0.0, 0.010, 0.010, NOW)
    assert monitor.tail(NOW) == 3.0
    assert monitor.tail(NOW + 60) == pytest.approx(1 + 2 / math.e)
    assert monitor.load(NOW + 600).tail == pytest.approx(1.0, abs=1e-3)


def test_a_long_batch_tells_more_of_interference_than_a_short_one() -> None:
    """Both are eleven times as long; the pause in the batch of 1 ms is little of the device's time."""
    short, long = LoadMonitor(), LoadMonitor()
    for monitor in (short, long):
        monitor.ran(0.010, 0.0, 0.0, 0.010, 0.010, NOW)
    short.ran(0.011, 0.0, 0.0, 0.001, 0.001, NOW)
    long.ran(0.110, 0.0, 0.0, 0.010, 0.010, NOW)
    assert short.slowdown(NOW) == pytest.approx(1 + 10 * (1 - math.exp(-0.01)))
    assert long.slowdown(NOW) == pytest.approx(1 + 10 * (1 - math.exp(-0.1)))


def test_a_neighbour_does_not_enter_the_profile_nor_a_single_pause_keep_it_out() -> None:
    monitor = LoadMonitor()
    assert monitor.calm(NOW)
    monitor.ran(0.100, 0.0, 0.0, 0.050, 0.050, NOW)
    assert not monitor.calm(NOW)
    assert monitor.calm(NOW + 5)


def test_full_width_demand_takes_the_batch_that_half_the_median_budget_allows() -> None:
    profile = LatencyProfile({Width(0.5): 0.6, Width(1): 0.7}, 4)
    monitor = LoadMonitor()
    monitor.arrived(30, 0.2, 1.0, 0.0)  # 2 a second, smoothed over 15 s
    profile.record(Width(0.5), 1, [0.005] * 20)
    assert full_width_demand(monitor, profile, 0.0) == 0, "the full width is not ready"
    for batch, seconds in ((1, 0.04), (2, 0.06), (4, 0.11)):
        profile.record(Width(1), batch, [seconds] * 20)
    assert full_width_demand(monitor, profile, 0.0) == pytest.approx(2 * 0.06 / 2), "0.11 s is more than half of 0.2 s"
    assert full_width_demand(monitor, profile, 15.0) == pytest.approx(2 * 0.03 / math.e)
    monitor.see_machine(others_cores=2.0, threads=2, cores=2)
    assert full_width_demand(monitor, profile, 0.0) == pytest.approx(2 * 2 * 0.03), "interference of 2"
