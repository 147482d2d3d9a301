"""Workloads against theory: rates, how bursty, how budgets spread; and what nobody can mean."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.random import default_rng
from numpy.typing import NDArray

from server.simulation.workload import (
    Arrivals,
    Seconds,
    Workload,
    bimodal,
    diurnal,
    gamma,
    hostile,
    lognormal,
    make_workload,
    on_off,
    one,
    parse_arrivals,
    parse_budgets,
    poisson,
    ramp,
    trace,
    uniform,
)

RATE, SECONDS = 100.0, 600.0


def drawn(arrivals: Arrivals, seconds: float = SECONDS, seed: int = 3) -> Seconds:
    times_s = arrivals(RATE, seconds, default_rng(seed))
    assert (np.diff(times_s) >= 0).all()
    assert 0 <= times_s[0] <= times_s[-1] < seconds
    return times_s


def share(condition: NDArray[np.bool_]) -> float:
    return float(np.mean(condition))


# -- arrivals


@pytest.mark.parametrize("cv2", [1.0, 2.0, 4.0, 8.0, 0.25])
def test_gaps_of_a_gamma_process_have_the_mean_and_the_variation_asked_for(cv2: float) -> None:
    times_s = drawn(gamma(cv2))
    # the count of a renewal process has the variance cv2 x its mean; three standard errors
    assert len(times_s) == pytest.approx(RATE * SECONDS, abs=3 * math.sqrt(cv2 * RATE * SECONDS))
    gaps_s = np.diff(times_s)
    assert gaps_s.var() / gaps_s.mean() ** 2 == pytest.approx(cv2, rel=0.08)


def test_poisson_has_its_rate_and_no_memory() -> None:
    times_s = drawn(poisson)
    assert len(times_s) == pytest.approx(RATE * SECONDS, abs=3 * math.sqrt(RATE * SECONDS))
    counts = np.histogram(times_s, int(SECONDS), (0, SECONDS))[0]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=3 * math.sqrt(2 / SECONDS))
    gaps_s = np.diff(times_s)
    assert share(gaps_s > 1 / RATE) == pytest.approx(math.exp(-1), abs=0.01)


def test_a_ramp_goes_up_and_comes_down() -> None:
    counts = np.histogram(drawn(ramp(0.5, 2.5)), 6, (0, SECONDS))[0]
    # a sixth of the time each: the line's mean there is 1/6, 3/6 and 5/6 of the way up
    expected = 100 * RATE * np.array([5 / 6, 1.5, 13 / 6, 13 / 6, 1.5, 5 / 6])
    assert (np.abs(counts - expected) < 3.5 * np.sqrt(expected)).all()


def test_on_and_off_take_turns_calm_first() -> None:
    times_s = drawn(on_off(0.2, 3.0, on_s=1.0, off_s=4.0))
    calm = times_s % 5 < 4
    assert calm.sum() == pytest.approx(0.2 * RATE * 480, abs=3.5 * math.sqrt(0.2 * RATE * 480))
    assert (~calm).sum() == pytest.approx(3 * RATE * 120, abs=3.5 * math.sqrt(3 * RATE * 120))
    assert not (drawn(on_off(0, 1, 1, 4)) % 5 < 4).any()


def test_a_day_peaks_at_four_times_its_trough_with_the_rate_as_its_mean() -> None:
    times_s = drawn(diurnal(period_s=60))  # ten days
    assert len(times_s) == pytest.approx(RATE * SECONDS, abs=3.5 * math.sqrt(RATE * SECONDS))
    hours = np.histogram(times_s % 60, 24, (0, 60))[0] / (SECONDS / 24)  # requests a second in each hour of the day
    assert hours.max() / hours.min() == pytest.approx(4, rel=0.12)
    assert (int(hours.argmax()) // 3, int(hours.argmin()) // 3) == (1, 5), "a quarter and three quarters of the day"
    assert len(drawn(diurnal(), 1200)) == pytest.approx(RATE * 1200, rel=0.01), "a day is twenty minutes"


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Four arrivals: 0, 1, 2 and 6 s after the first, as production wrote them, seven digits of a second."""
    path = tmp_path / "trace.csv"
    seconds = ["46.6805900", "47.6805900", "48.6805900", "52.6805900"]
    path.write_text("TIMESTAMP,tokens\n" + "".join(f"2023-11-16 18:15:{second},5\n" for second in seconds))
    return path


def test_a_trace_is_played_at_the_mean_rate_asked_for(recording: Path) -> None:
    # 4 arrivals at 2/s: 2 s, of which the six recorded become 1.5 and the last half is the gap to its repetition
    play = trace(recording)
    assert play(2.0, 2.0, default_rng(0)) == pytest.approx([0, 0.25, 0.5, 1.5])
    assert play(2.0, 0.4, default_rng(0)) == pytest.approx([0, 0.25]), "a window lasts as long as asked"
    assert play(2.0, 3.0, default_rng(0)) == pytest.approx([0, 0.25, 0.5, 1.5, 2.0, 2.25, 2.5]), "and over again"


def test_a_window_of_a_trace_begins_at_its_offset_and_goes_on_from_the_start(recording: Path) -> None:
    assert trace(recording, 0.25)(2.0, 1.1, default_rng(0)) == pytest.approx([0, 1.0])
    assert trace(recording, 0.5)(2.0, 2.0, default_rng(0)) == pytest.approx([0.5, 1.0, 1.25, 1.5])


def test_the_real_trace_keeps_its_pattern(shared_data: Path) -> None:
    path = shared_data / "traces/azure-llm-2023-conv.csv"
    whole = trace(path)(19_366 / 60, 60, default_rng(0))
    assert len(whole) == 19_366
    gaps_s = np.diff(whole)
    assert gaps_s.var() / gaps_s.mean() ** 2 == pytest.approx(1.2, abs=0.05)
    busy = trace(path, 0.3)(900.0, 60, default_rng(0))  # longer than the recording lasts at that rate
    assert len(busy) == pytest.approx(54_000, rel=0.1)


# -- budgets


def test_budgets_spread_as_told() -> None:
    def ms(text: str) -> Seconds:
        return 1000 * parse_budgets(text)(40_000, default_rng(5))

    assert set(ms("100")) == {100.0}
    assert set(ms("hostile")) == {0.01}
    even = ms("40-200")
    assert (even.min() >= 40, even.max() <= 200, even.min() < 41, even.max() > 199) == (True,) * 4
    assert even.mean() == pytest.approx(120, abs=1)
    assert even.std() == pytest.approx(160 / math.sqrt(12), rel=0.02)
    assert share(ms("bimodal:50-500") == 50) == pytest.approx(0.5, abs=0.01)
    tight = ms("bimodal:50-500:0.9")
    assert set(tight) == {50.0, 500.0}
    assert share(tight == 50) == pytest.approx(0.9, abs=0.006)
    logarithms = np.log(ms("lognormal:100:0.7"))
    assert (logarithms.mean(), logarithms.std()) == pytest.approx((math.log(100), 0.7), abs=0.012)
    assert np.log(ms("lognormal:100")).std() == pytest.approx(0.5, abs=0.01)


# -- together


def test_a_workload_is_exact_for_its_seed() -> None:
    def made(seed: int, rate: float = 50, budgets: str = "40-200") -> Workload:
        return make_workload("gamma:4", budgets, rate=rate, seconds=20, num_images=1000, seed=seed)

    first, again, other = made(1), made(1), made(2)
    for name in ("arrivals_s", "budgets_s", "images"):
        assert (getattr(first, name) == getattr(again, name)).all()
        assert not np.array_equal(getattr(first, name), getattr(other, name))
    assert (first.arrivals_s == made(1, budgets="100").arrivals_s).all(), "other budgets, the same arrivals and images"
    assert (first.images == made(1, budgets="100").images).all()
    assert (first.images.min() >= 0, first.images.max() < 1000, len(set(first.images)) > 500) == (True,) * 3


def test_a_workload_knows_its_rate_length_and_deadlines() -> None:
    load = Workload("by hand", np.array([0.0, 1.0, 4.0]), np.array([0.1, 0.2, 0.3]), np.array([5, 5, 6]))
    assert (len(load), load.seconds, load.rate) == (3, 4.0, 0.75)
    assert load.deadlines_s == pytest.approx([0.1, 1.2, 4.3])


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("poisson", poisson),
        ("gamma:4", gamma(4)),
        ("ramp:0.5-3", ramp(0.5, 3)),
        ("on-off:0.5-3:2:8", on_off(0.5, 3, on_s=2, off_s=8)),
        ("diurnal", diurnal()),
        ("diurnal:60", diurnal(60)),
    ],
)
def test_a_few_words_name_an_arrival_process(text: str, same: Arrivals) -> None:
    assert (drawn(parse_arrivals(text), 20) == drawn(same, 20)).all()


def test_a_trace_is_named_by_its_file(recording: Path) -> None:
    assert (
        parse_arrivals(f"trace:{recording}:0.5")(2, 2, default_rng(0)) == trace(recording, 0.5)(2, 2, default_rng(0))
    ).all()
    assert len(parse_arrivals(f"trace:{recording}")(2, 2, default_rng(0))) == 4


# -- refusals


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("poison", r"arrivals 'poison' are unknown; there are poisson, gamma:CV2, .*, trace:FILE:OFFSET"),
        ("gamma", "arrivals 'gamma' are unknown; there are"),
        ("gamma:x", "arrivals 'gamma:x': 'x'; a number is wanted, 0 or more; there are"),
        ("gamma:0", "arrivals 'gamma:0': CV.2 is 0; it must be above 0 and at most 1000; there are"),
        ("gamma:1e8", r"CV\^2 is 1e\+08; it must be above 0 and at most 1000; there are"),
        ("gamma:nan", "'nan'; a number is wanted"),
        ("ramp:3", "arrivals 'ramp:3': '3'; two numbers are wanted, LOW-HIGH; there are"),
        ("ramp:3-1", "from 3 to 1 times the rate; it must go up"),
        ("on-off:0-1:0:5", "0 s on and 5 s off; both must be above 0"),
        ("diurnal:0", "the period is 0 s; it must be above 0"),
    ],
)
def test_arrivals_that_mean_nothing_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_arrivals(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("soon", "budgets 'soon': 'soon'; a number is wanted, 0 or more; there are MS, LOW-HIGH, .*, hostile"),
        ("0", "the budget is 0 ms; it must be above 0"),
        ("200-40", "budgets from 200 to 40 ms; the first must be above 0 and the lower"),
        ("bimodal:40-200:1.5", "the lower budget's share is 1.5; it must be from 0 to 1"),
        ("lognormal:0", "a median of 0 ms"),
        ("hostile:3", "budgets 'hostile:3' are unknown"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_budgets(text)


def test_a_recording_that_is_none_is_refused(tmp_path: Path, recording: Path) -> None:
    with pytest.raises(ValueError, match="the offset is 1; it must be a share of the recording"):
        trace(recording, 1)
    (path := tmp_path / "other.csv").write_text("TIME\n2023-11-16 18:15:46\n")
    with pytest.raises(ValueError, match=r"other.csv is not a CSV file with a column TIMESTAMP"):
        trace(path)
    path.write_text("TIMESTAMP\n2023-11-16 18:15:46\n2023-11-16 18:15:46\n")
    with pytest.raises(ValueError, match=r"other.csv has 2 arrivals; there must be two different ones"):
        trace(path)
    with pytest.raises(FileNotFoundError):
        parse_arrivals(f"trace:{tmp_path / 'none.csv'}")


@pytest.mark.parametrize(
    ("rate", "seconds", "num_images", "sentence"),
    [
        (0, 10, 5, "the rate is 0: give a number above 0"),
        (math.inf, 10, 5, "the rate is inf"),
        (5, math.nan, 5, "the length in seconds is nan"),
        (5, 10, 0, "the number of images is 0"),
        (1e6, 3600, 5, r"1e\+06/s for 3600 s are more than 10,000,000 requests: lower one of them"),
        (1e-9, 1, 5, "'poisson, 1e-09/s for 1 s, budgets 100' has no request: give a higher rate or more seconds"),
    ],
)
def test_workloads_of_no_or_boundless_length_are_refused(
    rate: float, seconds: float, num_images: int, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_workload("poisson", "100", rate=rate, seconds=seconds, num_images=num_images)


@pytest.mark.parametrize("arrivals", ["ramp:0-1000000", "on-off:0-1000000:0.1:1000"])
def test_what_must_be_drawn_is_bounded_by_the_highest_rate(arrivals: str) -> None:
    with pytest.raises(ValueError, match=r"1e\+08/s for 1 s are more than 10,000,000 requests: lower one of them"):
        make_workload(arrivals, "100", rate=100, seconds=1, num_images=5)


def test_the_other_mixes_of_budgets_check_their_numbers() -> None:
    with pytest.raises(ValueError, match="the budget is -1 ms"):
        one(-1)
    with pytest.raises(ValueError, match="budgets from 5 to 4 ms"):
        uniform(5, 4)
    with pytest.raises(ValueError, match="budgets of 0 and 4 ms"):
        bimodal(0, 4)
    with pytest.raises(ValueError, match="a median of 5 ms, sigma -1"):
        lognormal(5, -1)
    assert hostile()(3, default_rng(0)).tolist() == [1e-5] * 3
