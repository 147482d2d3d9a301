"""What the policies are tried on: traffic, budgets and mishaps, told in the words of ``workload.py``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from server.simulation.device import Kill, Machine, Neighbour
from server.simulation.workload import PERIOD_S, Workload, make_workload

GOLDEN = 0.618034  # steps of it spread evenly over a recording, however many there are
USUAL = "40-200"
LOWEST_LOAD = 0.3
MOST_REQUESTS = 1_000_000  # of a run
TRACE = "trace:"  # and a file
Group = Literal["stationary", "changing", "budgets", "mishaps"]
Mishap = Literal["neighbour", "killed"]


@dataclass(frozen=True, slots=True)
class Scenario:
    """``load`` is in capacities of the machine's widest width, ``seconds`` how long requests arrive."""

    name: str
    group: Group
    arrivals: str
    load: float
    seconds: float
    budgets: str = USUAL
    mishap: Mishap | None = None

    @property
    def label(self) -> str:
        return f"{self.name} {self.load:g}x"

    @property
    def digest(self) -> str:
        """Of all that its workloads depend on: of a recording what it says, wherever it lies. Raises OSError."""
        told = self
        if self.arrivals.startswith(TRACE):
            recording = Path(self.arrivals.removeprefix(TRACE)).read_bytes()
            told = replace(self, arrivals=TRACE + hashlib.sha256(recording).hexdigest())
        return repr(told)

    def workload(self, machine: Machine, seed: int) -> Workload:
        """A recording has no chance in it: there, each seed is another window."""
        arrivals = self.arrivals
        if arrivals.startswith(TRACE):
            arrivals += f":{seed * GOLDEN % 1:.6f}"
        rate, images = self.load * machine.capacity, len(machine.correct)
        return make_workload(arrivals, self.budgets, rate=rate, seconds=self.seconds, num_images=images, seed=seed)

    @property
    def neighbour(self) -> Neighbour:
        """Half of the CPU is gone for the middle third."""
        return Neighbour(self.seconds / 3, 2 / 3 * self.seconds, 2.0 if self.mishap == "neighbour" else 1.0)

    @property
    def kill(self) -> Kill | None:
        return Kill(0.4 * self.seconds, 0.1 * self.seconds) if self.mishap == "killed" else None


def scenarios(machine: Machine, recording: Path | None, *, full: bool) -> list[Scenario]:
    """All of them; ``full``: long ones. Without a ``recording`` of arrivals, those that play it are left out."""
    seconds = _seconds(machine, full)
    short = [*_stationary(seconds), *_changing(seconds, recording), *_budgets(seconds), *_mishaps(seconds)]
    day = Scenario("day of 20 min", "changing", "diurnal", 1.5, PERIOD_S)
    return short + [day] * (full and day.load * machine.capacity * PERIOD_S < MOST_REQUESTS)


# A few that show the rest; nine in ten of what there is to say, in minutes.
SELECTION = {
    "poisson 0.5x",
    "poisson 1x",
    "poisson 2.5x",
    "gamma 4 1.5x",
    "gamma 4 2.5x",
    "ramp 1x",
    "on/off 1x",
    "diurnal 1.5x",
    "trace 1.5x",
    "neighbour 1.5x",
}


def training(machine: Machine, *, full: bool) -> list[Scenario]:
    """What parameters are chosen on, with seeds of its own."""
    seconds = _seconds(machine, full) / 2
    return [Scenario("training", "stationary", "gamma:4", load, seconds) for load in (0.8, 1.5, 3.0)]


def ladder(machine: Machine, *, full: bool) -> list[Scenario]:
    """What a table of the best width for each rate is made from."""
    seconds = _seconds(machine, full) / 2
    return [Scenario("ladder", "stationary", "gamma:4", LOWEST_LOAD * 2 ** (k / 2), seconds) for k in range(10)]


def _seconds(machine: Machine, full: bool) -> float:
    """Some thousand requests; on a fast device more, so that a controller that looks once a second sees something."""
    return max(10.0, 16_000 / machine.capacity) if full else max(5.0, 4_000 / machine.capacity)


def _stationary(seconds: float) -> Iterator[Scenario]:
    kinds = {"poisson": "poisson", "gamma 2": "gamma:2", "gamma 4": "gamma:4", "gamma 8": "gamma:8"}
    for name, arrivals in kinds.items():
        for load in (0.5, 0.8, 1.0, 1.5, 2.5, 4.0):
            yield Scenario(name, "stationary", arrivals, load, seconds)


def _changing(seconds: float, recording: Path | None) -> Iterator[Scenario]:
    span = seconds / 12
    kinds = {"ramp": "ramp:0.3-3", "on/off": f"on-off:0.4-3:{span:g}:{span:g}", "diurnal": f"diurnal:{seconds:g}"}
    if recording is not None:
        kinds["trace"] = f"{TRACE}{recording}"
    for name, arrivals in kinds.items():
        for load in (1.0, 1.5, 2.5):
            yield Scenario(name, "changing", arrivals, load, seconds)


def _budgets(seconds: float) -> Iterator[Scenario]:
    kinds = {
        "one budget": "100",
        "two budgets": "bimodal:40-200",
        "mostly tight": "bimodal:20-200:0.9",
        "log-normal": "lognormal:100",
    }
    for name, budgets in kinds.items():
        for load in (0.8, 2.0):
            yield Scenario(name, "budgets", "gamma:4", load, seconds, budgets)
    yield Scenario("hostile", "budgets", "gamma:4", 2.0, seconds, "hostile")


def _mishaps(seconds: float) -> Iterator[Scenario]:
    yield Scenario("neighbour", "mishaps", "poisson", 1.5, seconds, mishap="neighbour")
    yield Scenario("killed", "mishaps", "poisson", 1.5, seconds, mishap="killed")
