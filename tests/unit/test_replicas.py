"""Replicas and their autoscaler in simulated time: who gets requests, what is scraped, who comes and goes."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from server.load_monitor import full_width_demand
from server.policies import policy_of
from server.simulation.adaptive_server import Server
from server.simulation.autoscaler import Behaviour
from server.simulation.device import SimulatedDevice
from server.simulation.replicas import Course, Metric, Replica, Signal, Timing, play
from server.simulation.workload import Workload, make_workload
from tests.unit.simulated_machine import make_machine

MACHINE = make_machine()
DEVICE = SimulatedDevice(MACHINE)
FULL_RATE = 1 / MACHINE.profile().seconds_per_image(MACHINE.widths[-1])  # 64 images/s: four in 64 ticks of 1/1024 s
SOON = Timing(pending_s=2, loading_s=3, leaving_s=4)
make = partial(Server, policy_of("slackfit"), MACHINE.profile())


def load(arrivals: str, rate: float, seconds: float) -> Workload:
    return make_workload(arrivals, "300-500", rate=rate, seconds=seconds, num_images=8)


def course(workload: Workload, signal: Signal, replicas: int = 1, behaviour: Behaviour = Behaviour()) -> Course:  # noqa: B008
    return play(MACHINE, make, DEVICE, workload, signal, replicas=replicas, seed=1, timing=SOON, behaviour=behaviour)


def follow(metric: Metric, target: float) -> Signal:
    return Signal("any", metric, target)


STILL = Behaviour(least=2, most=2)


def test_every_request_is_counted_in_the_second_of_its_arrival() -> None:
    workload = load("poisson", 50.0, 20.0)
    found = course(workload, follow("demand", 0.75), 2, STILL)
    assert (
        found.arrived.tolist()
        == np.histogram(workload.arrivals_s, len(found.arrived), (0, len(found.arrived)))[0].tolist()
    )
    assert found.attainment == pytest.approx(1.0)
    assert found.effective_accuracy <= 6 / 8, "the widest gets six of eight images right"
    assert found.replica_hours == pytest.approx(2 * 20 / 3600, rel=0.06)


def test_a_load_that_rises_brings_replicas_which_come_when_they_are_ready() -> None:
    found = course(load("on-off:1-3:90:30", 0.7 * FULL_RATE, 120.0), follow("demand", 0.75))
    raised = int(np.flatnonzero(found.wanted > 1)[0])
    assert 30 < raised + 1 <= 60, "within two looks"
    assert found.wanted[-1] == 3
    first_paid, first_ready = (int(np.flatnonzero(count > 1)[0]) for count in (found.paid, found.ready))
    assert (first_paid, first_ready) == (raised + 1, raised + 1 + 5), "pending for 2 s, loading for 3"


def test_replicas_that_leave_are_paid_for_until_they_are_gone() -> None:
    found = course(load("poisson", 5.0, 60.0), follow("demand", 0.75), 3, Behaviour(down_window_s=0))
    assert found.ready[-1] == found.paid[-1] == 1
    fewer = int(np.flatnonzero(found.ready < 3)[0])
    assert found.paid[fewer : fewer + 5].tolist() == [3, 3, 3, 3, 1]
    assert found.attainment == pytest.approx(1.0), "what they had begun is answered"


def test_nobody_is_asked_who_is_not_ready() -> None:
    """There is no replica at first: requests are lost until the one that must be there is ready, and counted."""
    workload = load("poisson", 20.0, 40.0)
    found = course(workload, follow("demand", 0.75), 0)
    assert found.arrived.sum() == len(workload)
    first = int(np.flatnonzero(found.ready)[0])
    assert 5 < first < 25
    assert found.in_time[:first].sum() == 0
    assert found.in_time[first:].sum() == pytest.approx(found.arrived[first:].sum())


def test_the_guard_wants_more_where_budgets_are_missed_and_the_signal_does_not() -> None:
    overloaded = load("poisson", 320.0, 40.0)
    blind = Signal("blind", "demand", 1000.0)
    assert course(overloaded, blind, 1, Behaviour(most=6)).wanted.max() == 1
    guarded = course(overloaded, Signal("blind", "demand", 1000.0, guard=0.05), 1, Behaviour(most=6))
    assert guarded.wanted.max() > 1
    assert guarded.guarded > 0


def test_keda_shares_the_sum() -> None:
    found = course(load("poisson", 2.0 * FULL_RATE, 90.0), Signal("keda", "demand", 0.75, source="keda"))
    assert found.wanted[-1] in (3, 4)


def test_cpu_counts_of_a_new_pod_only_when_a_whole_window_was_seen() -> None:
    """Busy at 1.0 with a target of 0.5: two pods, and no more until the second is known."""
    behaviour = Behaviour(most=16)
    found = course(load("poisson", 3 * FULL_RATE, 120.0), Signal("cpu", "busy", 0.5, source="cpu"), 1, behaviour)
    first = int(np.flatnonzero(found.wanted == 2)[0])
    assert (found.wanted[first : first + 15] == 2).all()
    assert found.wanted.max() >= 4


def test_a_reading_is_what_the_server_would_tell() -> None:
    server = make()
    replica = Replica(MACHINE, lambda: server, DEVICE, -100.0, SOON, 0)
    requests = load("poisson", 40.0, 30.0)
    for second in range(31):
        mine = (requests.arrivals_s >= second) & (requests.arrivals_s < second + 1)
        replica.play(requests.arrivals_s[mine].tolist(), requests.deadlines_s[mine].tolist(), second + 1.0)
    replica.scrape(31.0)
    reading = replica.reading
    assert reading is not None
    assert reading.demand == full_width_demand(server.monitor, server.profile, 31.0)
    assert reading.demand == pytest.approx(40 / FULL_RATE * (1 - np.exp(-30 / 15)), rel=0.2)
    assert 0.3 < reading.busy <= 1
    assert reading.rate == server.monitor.demand.value(31.0)
    assert reading.missed == pytest.approx(0.0, abs=0.02)


def test_a_replica_that_loads_tells_zeros_and_a_pending_one_nothing() -> None:
    replica = Replica(MACHINE, make, DEVICE, 100.0, SOON, 0)
    assert (replica.running_s, replica.ready_s) == (102.0, 105.0)
    assert replica.reading is None
    replica.scrape(103.0)
    assert replica.reading is not None
    assert (replica.reading.demand, replica.reading.at_s) == (0.0, 103.0)
    assert not replica.ready(104.0)
    assert replica.ready(105.0)
