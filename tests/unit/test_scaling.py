"""Signals compared: loads, targets tuned to the same replica-hours, and the figures of a course."""

from __future__ import annotations

import math
import random
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from numpy.random import default_rng

from server.simulation.machines import built_in
from server.simulation.replicas import Course
from server.simulation.scaling import Load, full_width_rate, heavier, loads, recorded, summary, tuned
from tests.unit.simulated_machine import make_machine


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """A second half that is three times as busy as the first."""
    offsets_s = [*np.arange(0, 50, 1.0), *np.arange(50, 100, 1 / 3)]
    lines = [str(datetime(2026, 1, 1) + timedelta(seconds=float(s))) for s in offsets_s]
    path = tmp_path / "recording.csv"
    path.write_text("\n".join(["TIMESTAMP", *lines]))
    return path


def test_a_recording_gives_its_shape_and_chance_the_rest(recording: Path) -> None:
    arrivals_s = recorded(recording, 20.0, 400.0, 0.0, default_rng(0))
    assert (np.diff(arrivals_s) >= 0).all()
    assert 0 <= arrivals_s[0] < arrivals_s[-1] < 400
    assert len(arrivals_s) == pytest.approx(8000, rel=0.05)
    quiet, busy = (arrivals_s < 200).sum(), (arrivals_s >= 200).sum()
    assert busy / quiet == pytest.approx(3, rel=0.1)
    shifted_s = recorded(recording, 20.0, 400.0, 0.5, default_rng(0))
    assert (shifted_s < 200).sum() / (shifted_s >= 200).sum() == pytest.approx(3, rel=0.1), "from its middle on"


def test_loads_are_told_in_replicas() -> None:
    machine = heavier(built_in("cpu"))
    rate = full_width_rate(machine)
    assert rate == pytest.approx(4 / 0.03423 / 4, rel=0.01), "four images in 34 ms, four times as heavy"
    step = next(load for load in loads(None) if load.name == "step")
    arrivals_s = step.workload(machine, 0).arrivals_s
    assert step.step_s == 60
    assert (arrivals_s < 60).sum() / 60 == pytest.approx(step.rate * rate, rel=0.1)
    assert (arrivals_s >= 60).sum() / 180 == pytest.approx(3 * step.rate * rate, rel=0.05)
    assert [load.name for load in loads(Path("x"))] == [*(load.name for load in loads(None)), "trace"]


def test_machines_are_slow_in_the_middle_third() -> None:
    slowdown = Load("slow", "poisson", 1.0, 300.0, slowdown=2.0).device(make_machine())
    chance = random.Random(0)
    assert [slowdown.seconds(0, 1, now, chance) * 1024 for now in (50.0, 150.0, 250.0)] == [10, 20, 10]


@pytest.mark.parametrize("power", [1.0, 0.5, 3.0])
def test_a_target_is_found_for_the_same_hours(power: float) -> None:
    tried = tuned(lambda target: 2.0 / target**power, 1.0, 0.7)
    assert tried[-1][1] == pytest.approx(1.0, abs=0.02)
    assert tried[-1][0] == pytest.approx(2.0 ** (1 / power), rel=0.1)


def test_where_no_target_fits_the_closest_is_told() -> None:
    tried = tuned(lambda target: 3.0 if target < 1 else 0.9, 1.0, 0.7)
    assert len(tried) == 7
    assert tried[-1][1] == 0.9


def course(ready: list[int], wanted: list[int], worth: list[float]) -> Course:
    count = np.full(len(ready), 10.0)
    told = [np.array(values, float) for values in (ready, wanted, worth)]
    return Course(count, count, told[2], told[0], told[0], told[1])


def test_what_a_step_brought() -> None:
    machine = make_machine()
    load = Load("step", "poisson", 1.0, 30.0, step_s=5.0)
    ready, wanted = [1] * 15 + [3] * 15, [1] * 9 + [3] * 21
    told = summary(course(ready, wanted, [7.5] * 5 + [5.0] * 10 + [7.5] * 15), machine, load)
    assert (told["raised_s"], told["raised_syncs"], told["settled_s"]) == (5.0, 1, 10.0)
    assert told["debt_settled"] == pytest.approx(0)
    assert told["debt"] == pytest.approx(100 * (0.75 - 200 / 300))
    assert told["debt_of_the_served"] == pytest.approx(told["debt"])
    assert told["replica_hours"] == pytest.approx(60 / 3600)
    assert told["curves"]["ready"] == [1, 1, 1, 3, 3, 3]
    assert told["curves"]["debt"] == pytest.approx([0, 25, 25, 0, 0, 0])


def test_a_step_that_brought_nothing() -> None:
    load = Load("step", "poisson", 1.0, 30.0, step_s=5.0)
    told = summary(course([1] * 30, [1] * 30, [7.5] * 30), make_machine(), load)
    assert [told[name] for name in ("raised_s", "raised_syncs", "settled_s", "debt_settled")] == [None] * 4
    assert math.isclose(told["attainment"], 1.0)
