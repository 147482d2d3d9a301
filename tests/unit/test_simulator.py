"""The simulator on schedules worked out by hand, in ticks; see ``simulated.py``. One image takes 10, two take 12."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from server.simulation.baselines import Tuning, schedulers
from server.simulation.simulator import Batch, Frontend, Run, Scheduler, Simulation, simulate
from tests.unit.simulated import (
    IDEAL,
    NARROW,
    PREDICTED,
    TICK_S,
    Exact,
    Scripted,
    frontend,
    make_profile,
    played,
    traffic,
)


def test_everything_happens_in_order() -> None:
    """The second comes while the first runs, 0 to 10, and is asked about then; the third when the device is idle."""
    scripted = Scripted()
    assert played(scripted, (0, 50), (4, 60), (30, 9)) == (
        [(0, NARROW, 1), (10, NARROW, 1), (30, NARROW, 1)],
        [10, 20, 40],
    )
    assert scripted.asked == [
        ("start", [0, 4, 30], [50, 64, 39]),
        ("admits", 0, 0, 0),
        ("queued", 0, 0),
        ("next", 0),
        ("admits", 1, 4, PREDICTED),
        ("queued", 1, 4),
        ("ran", 0, 10, 10),
        ("next", 10),
        ("ran", 1, 10, 20),
        ("next", 20),
        ("admits", 2, 30, 20),
        ("queued", 2, 30),
        ("next", 30),
        ("ran", 2, 10, 40),
        ("next", 40),
    ]


def test_who_comes_at_the_instant_at_which_the_device_is_free_is_there_in_time() -> None:
    batches, ends = played(Scripted(most=4), (0, 99), (4, 99), (10, 99))
    assert (batches, ends) == ([(0, NARROW, 1), (10, NARROW, 2)], [10, 22, 22])


def test_an_idle_device_starts_with_the_first_of_those_who_come_together() -> None:
    assert played(Scripted(most=4), (5, 99), (5, 99), (5, 99)) == ([(5, NARROW, 1), (15, NARROW, 2)], [15, 27, 27])


def test_the_refused_are_never_queued_and_the_forgotten_never_answered() -> None:
    scripted = Scripted(refuse=[1])
    outcome = simulate(traffic((0, 9), (1, 9), (2, 9)), scripted, Exact())
    assert ("queued", 1, 1) not in scripted.asked
    assert outcome.refused.tolist() == [False, True, False]
    assert outcome.width.tolist() == [NARROW, -1, NARROW]
    assert np.isnan(outcome.finished_s).tolist() == [False, True, False]

    class Idle(Scripted):
        def next_batch(self, now: float) -> Batch | float | None:
            return None

    assert played(Idle(), (0, 9)) == ([], ["dropped"])


def test_decoders_are_a_pool() -> None:
    """Two at a time, 6 each: done at 6, 6, 12; the fourth finds both idle at 20. Device: 6 to 16, 28 and 38."""
    batches, ends = played(Scripted(most=2), (0, 99), (0, 99), (0, 99), (20, 99), front=frontend(decoders=2, decode=6))
    assert batches == [(6, NARROW, 1), (16, NARROW, 2), (28, NARROW, 1)]
    assert ends == [16, 28, 28, 38]


def test_one_decoder_is_a_line() -> None:
    """Done at 15, 30 and 45, where each finds the device idle."""
    batches, ends = played(Scripted(), (0, 99), (0, 99), (0, 99), front=frontend(decode=15))
    assert (batches, ends) == ([(15, NARROW, 1), (30, NARROW, 1), (45, NARROW, 1)], [25, 40, 55])


def test_an_image_is_judged_again_when_it_is_decoded() -> None:
    class Second(Scripted):
        """Refuses image 1 when it is asked the second time."""

        def admits(self, image: int, now: float, device_free_at: float) -> bool:
            again = ("admits", image) in [question[:2] for question in self.asked]
            return super().admits(image, now, device_free_at) and not (again and image == 1)

    scripted = Second()
    _, ends = played(scripted, (0, 99), (1, 99), front=frontend(decoders=2, decode=6))
    assert ends == [16, "refused"]
    assert [question for question in scripted.asked if question[0] == "admits"] == [
        ("admits", 0, 0, 0),
        ("admits", 1, 1, 0),
        ("admits", 0, 6, 0),
        ("admits", 1, 7, 6 + PREDICTED),
    ]


def test_hops_keep_the_device_and_answers_do_not() -> None:
    """Each batch keeps the device for 3 + 10 and is answered 4 later: 0 to 13 and 17, 13 to 26 and 30."""
    batches, ends = played(Scripted(), (0, 99), (1, 99), front=frontend(hop=3, respond=4))
    assert (batches, ends) == ([(0, NARROW, 1), (13, NARROW, 1)], [17, 30])


def test_a_scheduler_that_waits_is_asked_again_then_and_when_others_come() -> None:
    scripted = Scripted(wait_until=25, most=4)
    assert played(scripted, (0, 99), (8, 99)) == ([(25, NARROW, 2)], [37, 37])
    assert [question[1] for question in scripted.asked if question[0] == "next"] == [0, 8, 25, 37]


def test_an_alarm_that_was_set_anew_rings_once() -> None:
    class Impatient(Scripted):
        """Waits until 50; asked again, until 20."""

        def next_batch(self, now: float) -> Batch | float | None:
            self._wait_until = (20 if self.asked[-1][1] == 1 else 50) * TICK_S if now < 20 * TICK_S else 0
            return super().next_batch(now)

    scripted = Impatient(most=4)
    assert played(scripted, (0, 99), (8, 99)) == ([(20, NARROW, 2)], [32, 32])
    assert [question[1] for question in scripted.asked if question[0] == "next"] == [0, 8, 20, 32]


def test_a_run_tells_what_was_predicted() -> None:
    outcome = simulate(traffic((7, 9)), Scripted(), Exact(2))
    assert outcome.runs == [Run(7 * TICK_S, 20 * TICK_S, PREDICTED * TICK_S, NARROW, 1)]


def test_chance_is_that_of_the_seed() -> None:
    class Noisy:
        def seconds(self, width: int, images: int, now: float, chance: random.Random) -> float:
            return 10 * TICK_S * chance.lognormvariate(0, 0.3)

    def ends(seed: int) -> list[float]:
        make = schedulers(make_profile(), tuning=Tuning())["F-0.25"]
        return list(simulate(traffic(*[(5 * i, 99) for i in range(50)]), make(), Noisy(), seed=seed).finished_s)

    assert ends(1) == ends(1) != ends(2)


def test_time_never_stands_still() -> None:
    class Stuck(Scripted):
        def next_batch(self, now: float) -> Batch | float | None:
            return now

    with pytest.raises(AssertionError, match="stand still"):
        played(Stuck(), (0, 9))


def test_a_frontend_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="0 decoders decode nothing: give 1 or more"):
        Frontend(decoders=0)
    with pytest.raises(ValueError, match="hop_s is -1: give seconds, 0 or more"):
        Frontend(hop_s=-1)
    with pytest.raises(ValueError, match="decode_s is inf"):
        Frontend(decode_s=math.inf)


def test_a_script_is_a_scheduler() -> None:
    scripted: Scheduler = Scripted()
    assert scripted.next_batch(0.0) is None


@pytest.mark.parametrize("step", [1, 7, 50])
def test_played_bit_by_bit_it_is_the_same(step: int) -> None:
    """Requests that are added when the time before them was played, a second decoder's worth of them at once."""
    requests = [(0, 50), (4, 60), (4, 99), (30, 9), (61, 20), (100, 30)]
    whole, parts, front = Scripted(most=2), Scripted(most=2), frontend(decode=3, hop=1, respond=2)
    outcome = simulate(traffic(*requests), whole, Exact(), front)
    simulation = Simulation(parts, Exact(), front, 0)
    for now in range(0, 150, step):
        new = [(at, budget) for at, budget in requests if now <= at < now + step]
        if new:
            workload = traffic(*new)
            simulation.add(workload.arrivals_s.tolist(), workload.deadlines_s.tolist())
        simulation.play((now + step) * TICK_S)
    assert parts.asked[1:] == whole.asked[1:]
    bit_by_bit = simulation.outcome()
    assert bit_by_bit.finished_s.tolist() == outcome.finished_s.tolist()
    assert bit_by_bit.width.tolist() == outcome.width.tolist()
    assert bit_by_bit.runs == outcome.runs
    assert simulation.answers(1, 3) == (outcome.finished_s.tolist()[1:3], outcome.width.tolist()[1:3])


def test_nothing_happens_beyond_the_instant_that_is_played_to() -> None:
    simulation = Simulation(Scripted(), Exact(), IDEAL, 0)
    simulation.add([5 * TICK_S], [50 * TICK_S])
    simulation.play(5 * TICK_S)
    assert simulation.runs == []
    simulation.play(15 * TICK_S)
    assert len(simulation.runs) == 1
    assert simulation.answers(0, 1)[1] == [-1], "it ends at 15"
    simulation.play(16 * TICK_S)
    assert simulation.answers(0, 1) == ([15 * TICK_S], [NARROW])
