"""The live comparison: what its simulation knows of a shared core, what it reads off the server, and how it ends."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks import adaptive
from benchmarks.adaptive import (
    beside_the_loop,
    buckets,
    event_loop_s,
    p99_ms,
    parts_of,
    server_side,
    simulated,
    started_on,
)
from server.bench.compare import Running
from server.simulation.workload import Workload
from tests.unit.simulated_machine import make_machine

REFUSAL = 'scala_stage_duration_seconds_bucket{{le="{}",stage="refusal"}}'
RATIO = 'scala_prediction_ratio_bucket{{le="{}"}}'


def test_the_engine_gets_what_the_event_loop_leaves_of_their_core() -> None:
    """Three requests in the 50 ms around 1.01 s and one around 1.1 s, of 5 ms each: 30 and 10 % of the core."""
    slowdown = beside_the_loop([1.0, 1.01, 1.02, 1.1], 0.005)
    assert slowdown(1.01) == pytest.approx(1 / 0.7)
    assert slowdown(1.1) == pytest.approx(1 / 0.9)
    assert slowdown(1.06) == 1, "nothing between 1.035 and 1.085"
    assert beside_the_loop([1.0, 1.01, 1.02], 0.05)(1.01) == pytest.approx(10), "a tenth is always left"
    assert beside_the_loop([1.0, 1.01, 1.02], 0.0)(1.01) == 1


def test_a_simulated_batch_takes_longer_beside_the_loop() -> None:
    """One image takes 40/1024 s at full width. With a fifth of the core gone it takes 48.8 ms: too long for 45."""
    alone = Workload("by hand", np.array([1.0]), np.array([0.045]), np.array([0]))
    found = [simulated(make_machine(), alone, "fixed:1", loop_s) for loop_s in (0.0, 0.2 * 0.05)]
    assert [result.p50_ms for result in found] == pytest.approx([39.0625, 39.0625 / 0.8])
    assert [result.attainment for result in found] == [1, 0]


@pytest.mark.skipif(not psutil.LINUX, reason="threads are numbered otherwise")
def test_the_loops_cpu_time_is_that_of_the_main_thread() -> None:
    def burn() -> None:
        until = time.thread_time() + 0.1
        while time.thread_time() < until:
            pass

    before = event_loop_s(os.getpid())
    other = threading.Thread(target=burn)
    other.start()
    other.join()
    between = event_loop_s(os.getpid())
    burn()
    assert between - before < 0.05
    assert event_loop_s(os.getpid()) - between > 0.05


def test_what_the_servers_histograms_tell() -> None:
    """Of 200 refusals 198, or 99 %, took up to 5 ms. Of 40 batches 30 took 0.9 to 1.1 of the predicted median."""
    counters = {
        REFUSAL.format("0.002"): 150.0,
        REFUSAL.format("0.005"): 198.0,
        REFUSAL.format("0.01"): 200.0,
        REFUSAL.format("+Inf"): 200.0,
        REFUSAL.format("0.001").replace("refusal", "queue"): 999.0,
        REFUSAL.format("+Inf").replace("refusal", "queue"): 999.0,
        RATIO.format("0.9"): 4.0,
        RATIO.format("1.1"): 34.0,
        RATIO.format("+Inf"): 40.0,
        'scala_batches_total{within_p99="true"}': 39.0,
        'scala_batches_total{within_p99="false"}': 1.0,
    }
    assert server_side(counters) == {
        "refusal_p99_server_ms": 5.0,
        "p99_exceeded_share": 1 / 40,
        "prediction_within_10_percent": 0.75,
    }
    assert server_side(counters | {REFUSAL.format("0.005"): 197.0})["refusal_p99_server_ms"] == 10.0
    assert server_side({}) == dict.fromkeys(server_side(counters))


def test_series_of_a_histogram_are_added_and_the_last_bucket_has_no_end() -> None:
    both = {'x_bucket{a="1",le="0.5"}': 1.0, 'x_bucket{a="1",le="+Inf"}': 2.0, 'x_bucket{a="2",le="+Inf"}': 3.0}
    assert list(buckets(both, "x").items()) == [(0.5, 1.0), (float("inf"), 5.0)]
    assert p99_ms(buckets(both, "x")) is None


def test_each_server_is_started_once_and_all_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    @contextmanager
    def fake_process(policy: str, cpus: Sequence[int]) -> Iterator[Running]:
        told.append(f"{policy} on {cpus}")
        yield Running(8000 + len(told), 1)
        told.append(f"end of {policy}")

    monkeypatch.setattr(adaptive, "serving", fake_process)
    with started_on([0]) as server:
        assert [server(policy).port for policy in ("a", "b", "a")] == [8001, 8002, 8001]
    assert told == ["a on [0]", "b on [0]", "end of b", "end of a"]


@pytest.mark.parametrize(("late", "code"), [([], 0), (["gamma: adaptive: requests left late"], 1)])
def test_it_ends_with_a_line_of_json_and_fails_off_schedule(
    late: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class FakeBench:
        off_schedule = late

        def __init__(self, *told: Any, plots: Path, **others: Any) -> None:
            assert plots.is_dir(), "there is a folder for the plots before anything is measured"

        def measure(self, arrivals: Sequence[str]) -> dict[str, Any]:
            return {"arrivals": arrivals}

    monkeypatch.setattr(adaptive, "Bench", FakeBench)
    monkeypatch.setattr(adaptive, "heavier", lambda *told, **others: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(sys, "argv", ["adaptive", "--plots", str(tmp_path / "new/plots"), "--data", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        adaptive.main()
    assert ended.value.code == code
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1]) == {"arrivals": ["gamma:4"]}
    assert err.splitlines() == late


def test_parts_are_the_workloads_requests_each_from_its_own_start() -> None:
    """Eight seconds in four parts; in the third nobody comes."""
    whole = Workload("by hand", np.array([0.0, 1.5, 2.0, 7.0, 8.0]), np.full(5, 0.1), np.arange(5))
    parts = parts_of(whole, 4)
    assert [part.arrivals_s.tolist() for part in parts] == [[0.0, 1.5], [0.0], [1.0, 2.0]]
    assert [part.images.tolist() for part in parts] == [[0, 1], [2], [3, 4]]
