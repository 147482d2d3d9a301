"""Simulated devices: which latencies are drawn, what a neighbour costs, what is left when a worker is killed."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from scala_model.width import Width
from server.simulation.device import Kill, Machine, Mortal, Neighbour, SimulatedDevice
from server.simulation.simulator import Frontend, simulate
from tests.unit.simulated import IDEAL, NARROW, TICK_S, WIDE, Exact, Scripted, fates, frontend, traffic
from tests.unit.simulated_machine import CORRECT, make_machine


def machine_of(**seconds: tuple[float, ...]) -> Machine:
    """One width; ``b4`` are the samples of a batch of 4."""
    cells = {(Width(1), int(name[1:])): samples for name, samples in seconds.items()}
    return Machine("test", "", (Width(1),), cells, CORRECT[:, :1], IDEAL)


def drawn(device: SimulatedDevice, images: int, count: int = 4000) -> list[float]:
    chance = random.Random(1)
    return [device.seconds(0, images, 0.0, chance) for _ in range(count)]


def test_a_run_takes_one_of_the_measured_times_each_as_often() -> None:
    device = SimulatedDevice(machine_of(b1=(1.0, 2.0, 3.0, 6.0)))
    times = drawn(device, 1)
    for seconds in (1.0, 2.0, 3.0, 6.0):
        assert times.count(seconds) == pytest.approx(1000, abs=90)  # 3.3 standard errors


def test_between_two_buckets_it_is_the_larger_one_as_much_shorter_as_the_profile_says() -> None:
    # p50 of 1, 2 and 4 images: 10, 20 and 44; of 3, as two and one: 30, so a sample of 4 images counts 30/44
    device = SimulatedDevice(machine_of(b1=(10.0,), b2=(20.0,), b4=(40.0, 48.0)))
    assert sorted(set(drawn(device, 3))) == pytest.approx([40 * 30 / 44, 48 * 30 / 44])
    assert sorted(set(drawn(device, 4))) == [40, 48]


def test_a_neighbour_costs_a_factor_while_he_is_there() -> None:
    device = SimulatedDevice(make_machine(), Neighbour(10.0, 20.0, 2.0).slowdown)
    chance = random.Random(1)
    took = [device.seconds(NARROW, 1, now, chance) / TICK_S for now in (9.9, 10.0, 19.9, 20.0)]
    assert took == [10, 20, 20, 10]


def test_a_machine_tells_its_capacity_and_its_profile() -> None:
    machine = make_machine()
    assert machine.capacity == 4 * 1024 / 64  # four images in 64 ticks
    assert machine.accuracy.tolist() == [4 / 8, 5 / 8, 6 / 8]
    profile = machine.profile()
    assert profile.p50(Width(0.5), 3) == 32 * TICK_S
    assert profile.accuracy[Width(1)] == 0.75
    assert profile is not machine.profile()


def test_machines_are_equal_when_their_numbers_are() -> None:
    machine = make_machine()
    assert machine == make_machine()
    assert hash(machine) == hash(make_machine())
    assert machine == replace(machine, about="said otherwise")
    assert machine != replace(machine, correct=~CORRECT)
    assert machine != replace(machine, frontend=Frontend(decode_s=0.1))
    assert machine != replace(machine, cells=dict.fromkeys(machine.cells, (1.0,)))


def test_a_width_without_a_latency_is_refused() -> None:
    cells = {place: s for place, s in make_machine().cells.items() if place != (Width(0.5), 2)}
    with pytest.raises(ValueError, match=r"toy has no latency of 2 images at width 0\.5: measure"):
        replace(make_machine(), cells=cells)


# -- killed at 15, back at 45


KILL = Kill(15 * TICK_S, 30 * TICK_S)


def killed(*requests: tuple[float, float], front: Frontend = IDEAL) -> tuple[list[float | str], list[Scripted]]:
    """What became of the requests, and the servers that there were."""
    servers: list[Scripted] = []

    def make() -> Scripted:
        servers.append(Scripted())
        return servers[-1]

    outcome = simulate(traffic(*requests), Mortal(make, KILL), Exact(), front)
    return fates(KILL.survivors(outcome)), servers


def test_what_runs_and_what_waits_is_lost_and_who_comes_finds_nobody() -> None:
    ends, servers = killed((0, 99), (12, 99), (14, 99), (20, 99), (44, 99), (45, 99), (50, 99))
    #           answered; runs from 12; waits; there is no server for two; a new one
    assert ends == [10, "dropped", "dropped", "refused", "refused", 55, 65]
    assert servers[1].asked[0][0] == "start"
    assert {entry[1] for entry in servers[1].asked if entry[0] == "admits"} == {5, 6}


def test_what_the_old_server_had_is_nothing_to_the_new_one() -> None:
    # Runs from 14 to 54: the device is taken until then, but its end is not told to the new server.
    outcome_of_old = [(14.0, 99.0), (46.0, 99.0)]
    servers: list[Scripted] = []

    def make() -> Scripted:
        servers.append(Scripted())
        return servers[-1]

    simulate(traffic(*outcome_of_old), Mortal(make, KILL), Exact(4.0))
    assert [entry[:2] for entry in servers[1].asked if entry[0] == "ran"] == [("ran", 1)]


def test_who_was_being_decoded_is_lost_and_who_is_half_answered_too() -> None:
    ends, _ = killed((4, 99), (13, 99), front=frontend(decode=5))  # decoded at 9 and 18; the first runs until 19
    assert ends == ["dropped", "refused"]
    assert killed((0, 99), front=frontend(respond=6))[0] == ["dropped"]  # would have been answered at 16
    assert killed((0, 99), front=frontend(respond=5))[0] == [15]


def test_survivors_are_counted_without_the_lost() -> None:
    outcome = simulate(traffic((0, 99), (12, 99)), Mortal(Scripted, KILL), Exact())
    left = KILL.survivors(outcome)
    assert left.width.tolist() == [NARROW, -1]
    assert np.isnan(left.finished_s).tolist() == [False, True]
    assert left.runs == outcome.runs
    assert WIDE not in left.width
