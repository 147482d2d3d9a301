"""Replicas of the simulated server behind a balancer, and an autoscaler that reads their metrics.

Two loops, as in a cluster: each replica chooses widths for every batch; every 15 s the autoscaler chooses how many
replicas there are. Time goes by in steps of a second: who is ready shares the second's requests, all play it, those
that are due are scraped, and the autoscaler looks when it is its turn.

The balancer picks a ready replica at random for every request, as kube-proxy does for connections (its iptables mode).
Least connections would spread a burst more evenly; by chance alone, replicas do not interact within a second, and can
be played one after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from server.load_monitor import full_width_demand
from server.simulation.adaptive_server import Server
from server.simulation.autoscaler import (
    CPU_WARM_UP_S,
    SYNC_S,
    WINDOW_S,
    Autoscaler,
    Behaviour,
    Pod,
    by_average,
    by_total,
)
from server.simulation.device import Machine
from server.simulation.simulator import Device, Simulation
from server.simulation.workload import Workload

STEP_S = 1.0
SIXTEEN = Behaviour(most=16)
SCRAPE_EVERY_S = 15.0
GUARD_OVER_S = 120  # what the share of missed budgets is taken over, as rate(...[2m]) does
Metric = Literal["demand", "busy", "waiting", "rate", "missed"]
Make = Callable[[], Server]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a scrape told of a replica.

    ``demand``: ``scala_full_width_demand_ratio``. ``busy``: the share of the last 15 s in which the engine ran, which
    takes all cores of a pod; ``waiting``: images in the queue, the mean of the last 15 s, which is more than a gauge
    that is scraped can tell. ``rate``: requests/s, smoothed like ``demand``. ``missed``: the share of requests of the
    last two minutes that were not answered in time, the refused included.
    """

    at_s: float
    demand: float = 0.0
    busy: float = 0.0
    waiting: float = 0.0
    rate: float = 0.0
    missed: float = 0.0


@dataclass(frozen=True, slots=True)
class Tally:
    """Requests of a second: how many arrived, were answered in time, and the sum of the latter's accuracies."""

    arrived: int = 0
    in_time: int = 0
    worth: float = 0.0


class Replica:
    """One server, created at an instant; it is pending first, then runs and loads, then is ready."""

    def __init__(
        self, machine: Machine, make: Make, device: Device, created_s: float, timing: Timing, seed: int
    ) -> None:
        self.created_s, self.ready_s = created_s, created_s + timing.pending_s + timing.loading_s
        self.running_s = created_s + timing.pending_s
        self.leaves_s: float | None = None
        self.reading: Reading | None = None
        self.scrape_phase = seed % int(SCRAPE_EVERY_S)
        self._server = make()
        self._simulation = Simulation(self._server, device, machine.frontend, seed)
        self._accuracy = machine.accuracy.tolist()
        self._due_s: list[list[float]] = [[], []]  # deadlines of the requests of the last second, and of this
        self._num_requests = self._num_runs = 0
        self._busy_s: deque[float] = deque(maxlen=int(WINDOW_S))
        self._waiting: deque[int] = deque(maxlen=int(WINDOW_S))
        self._tallies: deque[Tally] = deque(maxlen=GUARD_OVER_S)

    def ready(self, now: float) -> bool:
        return now >= self.ready_s and self.leaves_s is None

    def play(self, arrivals_s: Sequence[float], deadlines_s: Sequence[float], until_s: float) -> Tally:
        """A second; what became of the requests of the second before, each of which had at most a second."""
        if arrivals_s:
            self._simulation.add(arrivals_s, deadlines_s)
        self._simulation.play(until_s)
        before, _ = self._due_s = [self._due_s[1], [*deadlines_s]]
        tally = self._tally(before)
        self._num_requests += len(before)
        runs = self._simulation.runs
        self._busy_s.append(sum(run.seconds for run in runs[self._num_runs :]))
        self._num_runs = len(runs)
        self._waiting.append(self._server.num_waiting)
        self._tallies.append(tally)
        return tally

    def _tally(self, deadlines_s: Sequence[float]) -> Tally:
        first = self._num_requests
        finished_s, widths = self._simulation.answers(first, first + len(deadlines_s))
        in_time = [w for end, due, w in zip(finished_s, deadlines_s, widths, strict=True) if end <= due]
        return Tally(len(deadlines_s), len(in_time), sum(self._accuracy[width] for width in in_time))

    def scrape(self, now: float) -> None:
        """A server that loads tells of nothing but zeros."""
        if now < self.ready_s:
            self.reading = Reading(now)
            return
        monitor, arrived = self._server.monitor, sum(tally.arrived for tally in self._tallies)
        self.reading = Reading(
            now,
            full_width_demand(monitor, self._server.profile, now),
            min(1.0, sum(self._busy_s) / WINDOW_S),
            sum(self._waiting) / max(1, len(self._waiting)),
            monitor.demand.value(now),
            1 - sum(tally.in_time for tally in self._tallies) / arrived if arrived else 0.0,
        )


@dataclass(frozen=True, slots=True)
class Timing:
    """A new replica is ``pending_s`` until it is scheduled and its image is there, then loads; one that leaves is sent
    nothing more, ends what it has, and is paid for until ``leaving_s`` later."""

    pending_s: float = 15.0
    loading_s: float = 5.0
    leaving_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Signal:
    """What the number of replicas follows. ``source``: a Pods metric, CPU utilisation as a Resource metric, or the sum
    through KEDA. ``guard``: a share of missed budgets that is a second metric; None: there is none."""

    name: str
    metric: Metric
    target: float
    source: Literal["pods", "cpu", "keda"] = "pods"
    guard: float | None = None


@dataclass(frozen=True, eq=False)
class Course:
    """What became of a load, by seconds (S): its requests, and replicas: paid for, ready, and wanted.

    ``guarded``: how many times the guard wanted more than the signal did.
    """

    arrived: NDArray[np.float64]
    in_time: NDArray[np.float64]
    worth: NDArray[np.float64]
    paid: NDArray[np.float64]
    ready: NDArray[np.float64]
    wanted: NDArray[np.float64]
    guarded: int = 0

    @property
    def replica_hours(self) -> float:
        return float(self.paid.sum()) * STEP_S / 3600

    @property
    def attainment(self) -> float:
        return float(self.in_time.sum() / self.arrived.sum())

    @property
    def effective_accuracy(self) -> float:
        return float(self.worth.sum() / self.arrived.sum())


def play(
    machine: Machine,
    make: Make,
    device: Device,
    workload: Workload,
    signal: Signal,
    *,
    replicas: int,
    seed: int,
    timing: Timing = Timing(),
    behaviour: Behaviour = SIXTEEN,
) -> Course:
    """A load, served by ``replicas`` servers that ``make`` makes, and then by as many as the signal wants.

    Every request's budget is at most a second. The seed decides who gets which request, when scrapes and looks are due,
    and how long batches take.
    """
    assert workload.budgets_s.max() <= STEP_S
    return _Play(machine, make, device, workload, signal, replicas, seed, timing, behaviour).play()


@dataclass
class _Play:
    machine: Machine
    make: Make
    device: Device
    workload: Workload
    signal: Signal
    num_first: int
    seed: int
    timing: Timing
    behaviour: Behaviour
    replicas: list[Replica] = field(default_factory=list)
    num_created: int = 0
    guarded: int = 0
    num_lost: int = 0  # requests of a second in which nobody was ready

    def play(self) -> Course:
        balance, clock = default_rng([self.seed, 1]), default_rng([self.seed, 2])
        self.autoscaler = Autoscaler(self.behaviour)
        sync_phase = int(clock.integers(int(SYNC_S)))
        wanted = self.num_first
        self._create(wanted, -CPU_WARM_UP_S)
        arrivals_s, deadlines_s = self.workload.arrivals_s, self.workload.deadlines_s
        seconds = int(self.workload.seconds) + 2  # the last requests are tallied a second later
        bounds = np.searchsorted(arrivals_s, STEP_S * np.arange(seconds + 1))
        told = []
        for second in range(seconds):
            now = STEP_S * second
            self._leave(now)
            paid, ready = len(self.replicas), [replica for replica in self.replicas if replica.ready(now)]
            this = slice(bounds[second], bounds[second + 1])
            tally = self._serve(arrivals_s[this], deadlines_s[this], ready, now + STEP_S, balance)
            self._scrape(second + 1)
            if (second + 1) % int(SYNC_S) == sync_phase:
                wanted = self._sync(now + STEP_S)
            told.append((*tally, paid, len(ready), wanted))
        arrived, in_time, worth, *counts = np.array(told, float).T
        paid_for, could, should = (count[:-1] for count in counts)
        return Course(arrived[1:], in_time[1:], worth[1:], paid_for, could, should, self.guarded)

    def _create(self, count: int, now: float) -> None:
        for _ in range(count):
            self.num_created += 1
            seed = 1000 * self.seed + 7 * self.num_created
            self.replicas.append(Replica(self.machine, self.make, self.device, now, self.timing, seed))

    def _leave(self, now: float) -> None:
        self.replicas = [r for r in self.replicas if r.leaves_s is None or now < r.leaves_s]

    def _serve(
        self,
        arrivals_s: NDArray[np.float64],
        deadlines_s: NDArray[np.float64],
        ready: Sequence[Replica],
        until_s: float,
        balance: Generator,
    ) -> tuple[int, int, float]:
        """What is told is of the second before, the requests that nobody was ready for included."""
        lost, self.num_lost = self.num_lost, 0 if ready else len(arrivals_s)
        chosen = balance.integers(max(1, len(ready)), size=len(arrivals_s))
        tallies = []
        for replica in self.replicas:
            mine = chosen == ready.index(replica) if replica in ready else np.zeros(len(chosen), np.bool_)
            tallies.append(replica.play(arrivals_s[mine].tolist(), deadlines_s[mine].tolist(), until_s))
        arrived, in_time, worth = (sum(getattr(tally, name) for tally in tallies) for name in Tally.__slots__)
        return lost + arrived, in_time, worth

    def _scrape(self, second: int) -> None:
        now = STEP_S * second
        for replica in self.replicas:
            if now >= replica.running_s and second % int(SCRAPE_EVERY_S) == replica.scrape_phase:
                replica.scrape(now)

    def _sync(self, now: float) -> int:
        staying = [replica for replica in self.replicas if replica.leaves_s is None]
        current = len(staying)
        wanted = self.autoscaler.sync(now, current, self._recommended(current, staying, now))
        self._create(wanted - current, now)
        unwanted = sorted(staying, key=lambda replica: -replica.created_s)[: max(0, current - wanted)]
        for replica in unwanted:  # the youngest first, and with them those that are not ready yet
            replica.leaves_s = now + self.timing.leaving_s if replica.ready(now) else now
        return wanted

    def _recommended(self, current: int, staying: Sequence[Replica], now: float) -> list[int]:
        signal = self.signal
        if signal.source == "keda":
            total = sum(_value(replica, signal.metric) or 0.0 for replica in self.replicas)
            found = [by_total(current, total, signal.target)]
        else:
            pods = [_pod(replica, signal.metric, now, is_cpu=signal.source == "cpu") for replica in staying]
            found = [by_average(current, pods, signal.target)]
        if signal.guard is not None:
            pods = [_pod(replica, "missed", now) for replica in staying]
            guard = by_average(current, pods, signal.guard)
            self.guarded += guard > max([*found, current])
            found.append(guard)
        return found


def _value(replica: Replica, metric: Metric) -> float | None:
    value: float | None = getattr(replica.reading, metric, None)
    return value


def _pod(replica: Replica, metric: Metric, now: float, *, is_cpu: bool = False) -> Pod:
    counts, reading = now >= replica.running_s, replica.reading
    if is_cpu and reading is not None and now < replica.created_s + CPU_WARM_UP_S:
        counts = reading.at_s >= replica.ready_s + WINDOW_S
    return Pod(_value(replica, metric), counts)
