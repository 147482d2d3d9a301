"""The figures of a run, its files and its picture: every arrival counts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from server.bench.plot import plot_run, run_figure
from server.bench.records import Records, save
from server.bench.summary import Quantile, Summary, off_schedule, quantile, table
from tests.unit.bench_server import (
    HAND_MADE,
    NAN,
    load_of,
    records_of,
)


def test_every_arrival_counts() -> None:
    summary = Summary.of(HAND_MADE, {})
    assert summary.requests == 8
    assert summary.rate == pytest.approx(10)
    assert summary.attainment == 3 / 8  # the last one came exactly in its budget
    assert summary.attainment_server == 4 / 8
    assert summary.attainment_admitted == 3 / 6
    assert summary.effective_accuracy == 2 / 8
    assert summary.mean_width == 0.75
    assert summary.widths == {0.5: 2, 1.0: 2}
    assert summary.statuses == {0: 1, 200: 4, 422: 1, 429: 1, 504: 1}
    assert summary.late == 1
    assert summary.latency_p50_ms is not None
    assert summary.latency_p50_ms.value == pytest.approx(60)
    assert summary.latency_p99_ms is not None
    assert summary.latency_p99_ms.value == pytest.approx(120)
    assert summary.latency_p99_ms.low == pytest.approx(90), "three of four lie below the p99 in 99.9 of 100 samples"
    assert summary.latency_p99_ms.high is None, "four are too few"
    assert summary.refusal_p99_ms is not None
    assert summary.refusal_p99_ms.value == pytest.approx(3)
    assert summary.wasted_engine_share is None
    # Wilson of 2 in 8, worked by hand with z = 1.96: centre (0.25 + 0.2401) / 1.4802, half 1.96 / 1.4802 x 0.2163
    assert summary.effective_accuracy_ci95 == pytest.approx((0.0715, 0.5907), abs=2e-4)


def test_engine_time_is_wasted_by_the_servers_own_count() -> None:
    counters = {'scala_engine_seconds_total{use="wasted"}': 1.0, 'scala_engine_seconds_total{use="answered"}': 4.0}
    assert Summary.of(HAND_MADE, counters).wasted_engine_share == 0.2


def test_a_run_without_answers_has_figures_too() -> None:
    nothing = records_of([429], [2.0], [100], [0], [NAN], [0])
    summary = Summary.of(nothing, {})
    assert (summary.attainment, summary.effective_accuracy) == (0, 0)
    assert (summary.attainment_admitted, summary.mean_width, summary.latency_p99_ms) == (None, None, None)
    assert "–" in table({"a": summary})[6]


def test_the_line_of_json_holds_every_figure_as_numbers() -> None:
    found = json.loads(json.dumps(Summary.of(HAND_MADE, {}).as_json(), allow_nan=False))
    assert found["attainment"] == 0.375
    assert found["statuses"] == {"0": 1, "200": 4, "422": 1, "429": 1, "504": 1}
    assert found["latency_p99_ms"] == {"value": 120.0, "low": 90.0, "high": None}
    assert found["lag_p99_ms"]["value"] == 0.5
    assert found["on_schedule"] is True


@pytest.mark.parametrize(
    ("lag_ms", "rate", "on_schedule"), [(0.9, 100, True), (1.1, 100, False), (1.9, 1200, True), (2.1, 1200, False)]
)
def test_late_requests_make_a_run_void(lag_ms: float, rate: float, on_schedule: bool) -> None:
    records = Records.blank(load_of([(i + 1) / rate for i in range(100)], [50] * 100))
    records.lag_s[:] = 0.0001
    records.lag_s[97:] = lag_ms / 1000
    assert Summary.of(records, {}).on_schedule is on_schedule
    records.lag_s[98] = 0.0001
    assert Summary.of(records, {}).on_schedule is on_schedule, "the p99 of a hundred is the last but one"
    records.lag_s[97:99] = 0.0001
    assert Summary.of(records, {}).on_schedule


def test_requests_that_never_left_make_a_run_void() -> None:
    records = Records.blank(load_of([0.01 * (i + 1) for i in range(1000)], [50] * 1000))
    records.lag_s[:] = 0.0001
    calm = Summary.of(records, {})
    records.lag_s[500] = NAN
    summary = Summary.of(records, {})
    assert (calm.on_schedule, summary.on_schedule) == (True, False)
    assert (calm.as_json()["unsent"], summary.as_json()["unsent"]) == (0, 1)
    assert ["  never sent", "0", "1"] in table({"calm": calm, "busy": summary})
    assert not any("never sent" in line[0] for line in table({"calm": calm}))
    remedy = ": keep a core free for this command, or ask for a lower rate"
    never = "1 requests never left because too many were open"
    assert off_schedule({"calm": calm, "busy": summary}) == [f"busy: {never}{remedy}"]
    records.lag_s[:30] = 0.002
    late = "requests left late, p99 2.00 ms where 1 ms are allowed"
    assert off_schedule({"busy": Summary.of(records, {})}) == [f"busy: {late}, and {never}{remedy}"]
    records.lag_s[500] = 0.0001
    assert off_schedule({"busy": Summary.of(records, {})}) == [f"busy: {late}{remedy}"]


def test_a_quantile_is_bounded_by_order_statistics() -> None:
    """For ten values the median lies from the second to the ninth: the sign test's 97.9 % interval."""
    assert quantile(np.arange(10.0, 0, -1), 0.5) == Quantile(5.0, 2.0, 9.0)
    assert quantile(np.array([]), 0.5) is None
    fewer, enough = (quantile(np.arange(1.0, 1 + count), 0.99) for count in (367, 368))
    assert fewer is not None
    assert fewer.high is None
    assert enough is not None
    assert enough.high == 368, "0.99^368, the chance that all lie below the p99, is just below 2.5 %"


def test_the_bounds_of_a_p99_hold_it_as_often_as_they_say() -> None:
    rng, truth, held = np.random.default_rng(0), -math.log(0.01), 0
    for _ in range(400):
        found = quantile(rng.exponential(size=1000), 0.99)
        assert found is not None
        assert found.low is not None
        held += found.low <= truth <= (math.inf if found.high is None else found.high)
    assert held / 400 >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 400)
    assert held / 400 < 0.995, "nor are they wider than needed"


def test_records_are_kept_as_they_are(tmp_path: Path) -> None:
    save(tmp_path / "run.npz", HAND_MADE)
    with np.load(tmp_path / "run.npz") as kept:
        assert kept["status"].tolist() == HAND_MADE.status.tolist()
        assert kept["arrivals_s"] == pytest.approx(HAND_MADE.workload.arrivals_s)
        assert set(kept) >= {"budgets_s", "images", "lag_s", "latency_s", "width", "correct", "met"}


def test_the_picture_shows_a_run_over_time(tmp_path: Path) -> None:
    count = 600
    records = Records.blank(load_of([0.1 * (i + 1) for i in range(count)], [100] * count))
    records.status[:] = 200
    records.latency_s[:] = 0.05
    records.width[:300], records.width[300:] = 1.0, 0.25
    records.correct[:] = True
    records.status[300:310] = 429
    figure = run_figure(records, "a run")
    mix, latency, attainment, accuracy = figure.axes
    legend = mix.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["0.25", "1", "none"]
    p50 = np.asarray(latency.lines[0].get_ydata(), float)
    assert np.nanmin(p50) == np.nanmax(p50) == pytest.approx(50)
    shares: NDArray[np.float64] = np.asarray(attainment.lines[0].get_ydata(), float)
    assert shares.min() < 20 < 100 == shares.max()
    assert accuracy.get_xlabel() == "time of arrival (s)"
    plot_run(tmp_path / "a.png", records, "a run")
    plot_run(tmp_path / "b.png", records, "a run")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
