"""Signals to scale replicas by, compared on the same loads and with the same replica-hours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import SeedSequence, default_rng
from numpy.typing import NDArray

from server.simulation.autoscaler import SYNC_S, Behaviour
from server.simulation.device import Machine, Neighbour, SimulatedDevice
from server.simulation.experiment import warm_server
from server.simulation.replicas import SIXTEEN, Course, Signal, play
from server.simulation.scenarios import GOLDEN
from server.simulation.workload import Workload, make_workload, parse_budgets, read_timestamps

TARGET = 0.75  # of full-width demand
GUARD = 0.05  # of requests that miss their budgets: more replicas where it is more, whatever the demand says
LEVEL_S = 10.0  # a recording's rate is taken over so long, of the time in which it is played
EVERY_S = 5  # of what is kept for a plot
CLOSE = 0.02  # of replica-hours
MOST_TRIES = 7
FIRST_S = 30.0
# Requests cost the simulator time, seconds cost none: the network is so many times as heavy as the one that was
# measured, with budgets as many times as long, and a replica gets as many times fewer requests.
HEAVIER = 4.0
BUDGETS, MIDDLE_BUDGET_S = "160-800", 0.48

OUR_SIGNAL = Signal("full-width demand", "demand", TARGET, guard=GUARD)
KEDA = replace(OUR_SIGNAL, name="the same through KEDA", source="keda")
RIVALS = (
    Signal("CPU utilisation", "busy", 0.88, source="cpu"),
    Signal("queue length", "waiting", 1.0),
    Signal("requests/s", "rate", 22.0),
)


@dataclass(frozen=True, slots=True)
class Load:
    """``rate`` is in replicas' worth: 1 is what one can serve at full width, in batches that suit the budgets.

    ``arrivals`` are words of ``workload.py``, or the path of a recording that is played in ``seconds``: its rate, over
    ten seconds each, with arrivals by chance. In the middle third batches take ``slowdown`` times as long, everywhere.
    """

    name: str
    arrivals: str
    rate: float
    seconds: float
    step_s: float | None = None  # when the load rises
    slowdown: float = 1.0
    is_recording: bool = False

    def workload(self, machine: Machine, seed: int) -> Workload:
        rate = self.rate * full_width_rate(machine)
        if not self.is_recording:
            return make_workload(self.arrivals, BUDGETS, rate=rate, seconds=self.seconds, num_images=1, seed=seed)
        times, mix = map(default_rng, SeedSequence(seed).spawn(2))
        arrivals_s = recorded(Path(self.arrivals), rate, self.seconds, seed * GOLDEN % 1, times)
        images = np.zeros(len(arrivals_s), np.int64)
        return Workload(self.name, arrivals_s, parse_budgets(BUDGETS)(len(arrivals_s), mix), images)

    def device(self, machine: Machine) -> SimulatedDevice:
        third_s = self.seconds / 3
        return SimulatedDevice(machine, Neighbour(third_s, 2 * third_s, self.slowdown).slowdown)


def recorded(path: Path, rate: float, seconds: float, offset: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Poisson arrivals of ``rate`` on average that rise and fall as a whole recording does, played in ``seconds`` from
    this share of it on. Raises what ``read_timestamps`` does."""
    recorded_s, count = read_timestamps(path), math.ceil(seconds / LEVEL_S)
    played_s = (recorded_s / recorded_s[-1] + 1 - offset) % 1 * seconds
    level = np.histogram(played_s, count, (0, count * LEVEL_S))[0]
    numbers = rng.poisson(level * rate * seconds / level.sum())
    starts_s = np.repeat(LEVEL_S * np.arange(count), numbers)
    arrivals_s = np.sort(starts_s + rng.uniform(0, LEVEL_S, len(starts_s)))
    return arrivals_s[arrivals_s < seconds]


def loads(recording: Path | None) -> list[Load]:
    """Without a ``recording`` of arrivals, the one that plays it is left out."""
    found = [
        Load("step", "on-off:1-3:180:60", 1.4, 240.0, step_s=60.0),
        Load("ramp", "ramp:0.2-2", 1.6, 360.0),
        Load("slow machines", "poisson", 1.4, 360.0, slowdown=1.8),
        Load("day", "diurnal:720", 1.6, 720.0),
        Load("bursts", "on-off:0.7-2.1:90:330", 1.4, 840.0),  # each begins when nobody is kept for the one before
    ]
    return found + [Load("trace", str(recording), 1.6, 600.0, is_recording=True)] * (recording is not None)


def heavier(machine: Machine, factor: float = HEAVIER) -> Machine:
    """All batches take so many times as long."""
    cells = {place: tuple(factor * second for second in seconds) for place, seconds in machine.cells.items()}
    return replace(machine, about=f"{machine.about} All latencies times {factor:g}.", cells=cells)


def full_width_rate(machine: Machine) -> float:
    """Images a second of one replica at full width, as ``full_width_demand`` counts them with these budgets."""
    return 1 / machine.profile().seconds_per_image(machine.widths[-1], MIDDLE_BUDGET_S / 2)


# -- one run


def run(machine: Machine, load: Load, signal: Signal, seed: int, behaviour: Behaviour = SIXTEEN) -> Course:
    """From as many replicas on as our signal wants for the load's first half minute, whatever the signal."""
    workload = _workload(machine, load, seed)
    first = np.searchsorted(workload.arrivals_s, FIRST_S) / FIRST_S / full_width_rate(machine)
    replicas = min(max(1, math.ceil(first / TARGET)), behaviour.most)
    return play(
        machine,
        partial(warm_server, machine, BUDGETS, "adaptive"),
        _device(machine, load),
        workload,
        signal,
        replicas=replicas,
        seed=seed,
        behaviour=behaviour,
    )


# What runs of a process have in common is made once.
@lru_cache(maxsize=4)
def _workload(machine: Machine, load: Load, seed: int) -> Workload:
    return load.workload(machine, seed)


@lru_cache(maxsize=4)
def _device(machine: Machine, load: Load) -> SimulatedDevice:
    return load.device(machine)


def summary(course: Course, machine: Machine, load: Load) -> dict[str, Any]:
    """Figures of a run, and a few curves. ``debt``: accuracy lost against full width, over all arrivals, in points; the
    missed count as lost wholly. ``debt_of_the_served``: without them.

    ``raised_s``, ``raised_syncs``: seconds, and periods of the autoscaler begun, from the load's step until more
    replicas were wanted; ``settled_s``: seconds from the step until as many were ready as were ever wanted;
    ``debt_settled``: debt from then on. None: never.
    """
    full, served = float(machine.accuracy[-1]), course.in_time.sum()
    return {
        "arrivals": int(course.arrived.sum()),
        "replica_hours": course.replica_hours,
        "attainment": course.attainment,
        "effective_accuracy": course.effective_accuracy,
        "debt": 100 * (full - course.effective_accuracy),
        "debt_of_the_served": 100 * (full - float(course.worth.sum() / served)) if served else 0.0,
        "most_ready": int(course.ready.max()),
        "guarded": course.guarded,
        **(_after_step(course, full, load.step_s) if load.step_s is not None else {}),
        "curves": _curves(course, full),
    }


def _after_step(course: Course, full: float, step_s: float) -> dict[str, float | None]:
    at = int(step_s)
    raised = np.flatnonzero(course.wanted[at:] > course.wanted[at - 1])
    settled = np.flatnonzero(course.ready[at:] >= course.wanted.max())
    raised_s = float(raised[0] + 1) if raised.size else None
    told = {"raised_s": raised_s, "raised_syncs": None if raised_s is None else math.ceil(raised_s / SYNC_S)}
    if raised_s is None or not settled.size:
        return told | {"settled_s": None, "debt_settled": None}
    after = slice(at + int(settled[0]), None)
    debt = 100 * (full - float(course.worth[after].sum() / course.arrived[after].sum()))
    return told | {"settled_s": float(settled[0]), "debt_settled": debt}


def _curves(course: Course, full: float) -> dict[str, list[float]]:
    """Means of ``EVERY_S`` seconds: replicas that were ready, requests/s, and points of accuracy lost."""
    ends = np.arange(0, len(course.arrived) - EVERY_S + 1, EVERY_S)
    ready, arrived, worth = (
        np.add.reduceat(values, ends) / EVERY_S for values in (course.ready, course.arrived, course.worth)
    )
    debt = 100 * (full - worth / np.maximum(arrived, 1 / EVERY_S))
    return {name: np.round(v, 3).tolist() for name, v in (("ready", ready), ("rate", arrived), ("debt", debt))}


# -- the same replica-hours


def tuned(hours: Callable[[float], float], goal: float, guess: float) -> list[tuple[float, float]]:
    """Targets that were tried with the replica-hours that they came to; the last is the closest to ``goal``, within 2 %
    unless seven tries did not find one. A higher target never needs more, but for chance.

    Until one is on either side, the next is higher by a power of the excess, at most twofold; then halfway between.
    """
    tried: list[tuple[float, float]] = []
    target, low, high = guess, 0.0, math.inf  # too many replicas at ``low``, too few at ``high``
    for _ in range(MOST_TRIES):
        tried.append((target, hours(target)))
        excess = tried[-1][1] / goal
        if abs(excess - 1) <= CLOSE:
            break
        low, high = (target, high) if excess > 1 else (low, target)
        bracketed = low > 0 and high < math.inf
        target = math.sqrt(low * high) if bracketed else target * min(2.0, max(0.5, excess**1.5))
    return sorted(tried, key=lambda entry: -abs(entry[1] / goal - 1))


def compared(
    machine: Machine, load: Load, signal: Signal, seeds: tuple[int, ...], goals: tuple[float, ...] | None
) -> list[dict[str, Any]]:
    """The signal on the load, once a seed, as summaries; with ``goals``, replica-hours that each seed's target is tuned
    to, from the one before on."""
    found = []
    for seed, goal in zip(seeds, goals or [None] * len(seeds), strict=True):
        courses: dict[float, Course] = {}
        hours = partial(_hours, courses, machine, load, signal, seed)
        if goal is None:
            hours(signal.target)
        else:
            signal = replace(signal, target=tuned(hours, goal, signal.target)[-1][0])
        row = {"target": signal.target, "tries": len(courses)}
        found.append(row | summary(courses[signal.target], machine, load))
    return found


def _hours(
    courses: dict[float, Course], machine: Machine, load: Load, signal: Signal, seed: int, target: float
) -> float:
    """Adds the run to ``courses``."""
    courses[target] = run(machine, load, replace(signal, target=target), seed)
    return courses[target].replica_hours


def steady(machine: Machine, demand: float, seed: int, seconds: float = 60.0) -> dict[str, Any]:
    """One replica, and no more, under so much full-width demand."""
    load = Load("steady", "poisson", demand, seconds)
    alone = Behaviour(least=1, most=1)
    course = run(machine, load, replace(OUR_SIGNAL, guard=None), seed, alone)
    return {"demand": demand} | summary(course, machine, load)
