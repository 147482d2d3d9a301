"""One policy on one workload, judged; and what several runs of two policies say about their difference. Pure functions.

Every arrival counts: who is refused, never answered or answered late is a miss. No policy sees which images a width
gets right. So what a schedule is worth on average over all images, its expected accuracy, has the mean of what it earns
on the images that were drawn, and less of their chance; policies are compared by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import NormalDist, fmean, stdev

import numpy as np
from numpy.random import default_rng
from numpy.typing import NDArray

from scala_model.width import Width
from server.policies import policy_of
from server.simulation.adaptive_server import Server
from server.simulation.baselines import Tuning, schedulers, switching_table
from server.simulation.baselines.variable_width import Switching
from server.simulation.device import Machine, Mortal, Neighbour, SimulatedDevice
from server.simulation.oracle import upper_bound
from server.simulation.scenarios import Scenario
from server.simulation.simulator import Batch, Frontend, Outcome, Scheduler, simulate
from server.simulation.workload import Workload, parse_budgets

OURS, STATIC = "ours", "ours-static"
NUM_SEEN = 500  # as many budgets as the server remembers
TICK_S = 1e-9  # less than any two instants of a device are apart
Make = Callable[[], Scheduler]


@dataclass(frozen=True, slots=True)
class Result:
    """What one policy made of one workload; shares are 0..1.

    ``attainment``: answered in time, of all arrivals; ``attainment_admitted``: of those not refused.
    ``effective_accuracy``: in time and right, by the image that was asked for; ``expected_accuracy``: the same, by the
    mean over all images. ``expired``: let in and never answered. ``wasted``: device time spent on answers that came too
    late, of all device time. ``widest``: arrivals answered at the widest width.
    """

    arrivals: int
    attainment: float
    attainment_admitted: float
    effective_accuracy: float
    expected_accuracy: float
    mean_width: float
    p50_ms: float
    p99_ms: float
    refused: int
    expired: int
    late: int
    wasted: float
    switches_per_s: float
    widest: float


class Static(Server):
    """The server without what it learns from the batches that it runs, and from what becomes of its images."""

    def ran(self, batch: Batch, seconds: float, now: float) -> None:
        pass

    def settled(self, worth: float | None, now: float) -> None:
        pass


def policies(machine: Machine, budgets: str, tuning: Tuning) -> dict[str, Make]:
    """Every policy by its name, each a maker of new schedulers.

    ``ours`` is the server's adaptive policy; ``slackfit``, ``threshold`` and ``fixed:WIDTH`` are the server with these
    instead, as a setting lets it be compared live; the others are ``baselines``. The server has seen requests with
    ``budgets`` before, and planned for them: the first seconds of its life are not what is compared.
    """
    servers = {name: partial(warm_server, machine, budgets, name) for name in ("slackfit", "threshold")}
    fixed = {f"fixed:{width}": partial(warm_server, machine, budgets, "adaptive", (width,)) for width in machine.widths}
    return {
        OURS: partial(warm_server, machine, budgets, "adaptive"),
        STATIC: partial(warm_server, machine, budgets, "adaptive", static=True),
        **servers,
        **fixed,
        **_baselines(machine, tuning),
    }


def warm_server(
    machine: Machine, budgets: str, policy: str, widths: tuple[Width, ...] | None = None, static: bool = False
) -> Server:
    """A new server that has seen ``budgets`` and planned for them."""
    return deepcopy(_warm(machine, budgets, policy, widths, static))


# A process runs one policy after the other on the same workload: what they have in common is made once.
@lru_cache(maxsize=16)
def _baselines(machine: Machine, tuning: Tuning) -> Mapping[str, Make]:
    return schedulers(machine.profile(), tuning=tuning, max_images=machine.max_images)


@lru_cache(maxsize=2)
def _device(machine: Machine, neighbour: Neighbour) -> SimulatedDevice:
    return SimulatedDevice(machine, neighbour.slowdown)


@lru_cache(maxsize=2)
def _workload(machine: Machine, scenario: Scenario, seed: int) -> Workload:
    return scenario.workload(machine, seed)


@lru_cache(maxsize=32)
def _warm(machine: Machine, budgets: str, policy: str, widths: tuple[Width, ...] | None, static: bool) -> Server:
    """A server that never runs, to be copied: planning takes longer than most runs."""
    server = (Static if static else Server)(
        policy_of(policy), machine.profile(), widths=widths, max_images=machine.max_images
    )
    seen_s = parse_budgets(budgets)(NUM_SEEN, default_rng(0)).tolist()
    server.monitor.budgets_s.extend(seen_s)
    server.start([0.0], seen_s[-1:])
    server.admits(0, 0.0, 0.0)
    return server


def run(machine: Machine, scenario: Scenario, policy: str, tuning: Tuning, seed: int) -> Result:
    """The same arrivals, budgets, images and seed of the noise for every policy."""
    workload, make = _workload(machine, scenario, seed), policies(machine, scenario.budgets, tuning)[policy]
    device, kill = _device(machine, scenario.neighbour), scenario.kill
    scheduler = make() if kill is None else Mortal(make, kill)
    outcome = simulate(workload, scheduler, device, machine.frontend, seed=seed)
    return judge(outcome if kill is None else kill.survivors(outcome), workload, machine)


def switching(machine: Machine, ladder: Sequence[Scenario], edf: bool, seed: int) -> Switching:
    """The table by which MS chooses; ``edf``: in the queue that is the same for all."""
    at = {scenario.load * machine.capacity: scenario for scenario in ladder}
    return switching_table(
        machine.profile(),
        at,
        lambda rate: at[rate].workload(machine, seed),
        SimulatedDevice(machine),
        machine.frontend,
        edf=edf,
        max_images=machine.max_images,
        seed=seed,
    )


def judge(outcome: Outcome, workload: Workload, machine: Machine) -> Result:
    finished_s = outcome.finished_s
    answered = ~np.isnan(finished_s)
    in_time = finished_s <= workload.deadlines_s
    width, images = outcome.width[in_time], workload.images[in_time]
    latency_ms = 1000 * (finished_s - workload.arrivals_s)[answered]
    served = outcome.width[answered]
    count = len(workload)
    return Result(
        arrivals=count,
        attainment=float(in_time.mean()),
        attainment_admitted=_share(in_time.sum(), count - outcome.refused.sum()),
        effective_accuracy=float(machine.correct[images, width].sum()) / count,
        expected_accuracy=float(machine.accuracy[width].sum()) / count,
        mean_width=float(np.array([float(width) for width in machine.widths])[served].mean()) if served.size else 0.0,
        p50_ms=float(np.quantile(latency_ms, 0.5)) if latency_ms.size else 0.0,
        p99_ms=float(np.quantile(latency_ms, 0.99)) if latency_ms.size else 0.0,
        refused=int(outcome.refused.sum()),
        expired=int((~answered & ~outcome.refused).sum()),
        late=int((answered & ~in_time).sum()),
        wasted=_wasted(outcome, finished_s[in_time], machine.frontend),
        switches_per_s=_switches(outcome) / workload.seconds if workload.seconds else 0.0,
        widest=float((served == len(machine.widths) - 1).sum()) / count,
    )


def _share(part: float, whole: float) -> float:
    """Of nothing, nothing was missed."""
    return float(part / whole) if whole else 1.0


def _wasted(outcome: Outcome, in_time_s: NDArray[np.float64], frontend: Frontend) -> float:
    """Share of the device's time that went into images not answered in time, each with its part of its batch's time."""
    started_s = np.array([run.started_s for run in outcome.runs])
    took_s = np.array([run.seconds for run in outcome.runs])
    per_image_s = took_s / np.array([run.images for run in outcome.runs])
    answered_s = started_s + frontend.hop_s + took_s + frontend.respond_s
    useful = np.searchsorted(answered_s - TICK_S, in_time_s) - 1  # all images of a run are answered at one instant
    return max(0.0, 1 - float(per_image_s[useful].sum() / took_s.sum())) if outcome.runs else 0.0


def _switches(outcome: Outcome) -> int:
    return sum(run.width != before.width for before, run in zip(outcome.runs, outcome.runs[1:], strict=False))


def bound(machine: Machine, scenario: Scenario, seed: int) -> float:
    """What no policy exceeds in expected accuracy: see ``oracle.py``. The device always takes its shortest time."""
    workload, front = _workload(machine, scenario, seed), machine.frontend
    shortest = [[(b, min(s)) for (w, b), s in machine.cells.items() if w == width] for width in machine.widths]
    return upper_bound(
        workload.arrivals_s + front.decode_s + front.hop_s,
        workload.deadlines_s - front.respond_s,
        [min(seconds / batch for batch, seconds in row) for row in shortest],
        machine.accuracy,
        least_s=[min(seconds for _, seconds in row) for row in shortest],
    ).effective_accuracy


# -- several runs


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def paired(ours: Sequence[float], others: Sequence[float]) -> Interval:
    """The mean of ours - other over runs of the same workloads, with Student's interval. At least 3 runs."""
    differences = [a - b for a, b in zip(ours, others, strict=True)]
    assert len(differences) >= 3
    mean, error = fmean(differences), stdev(differences) / math.sqrt(len(differences))
    half = students_t(len(differences) - 1) * error
    return Interval(mean, mean - half, mean + half)


def students_t(freedom: int) -> float:
    """The 97.5 % quantile, within 1 % from 2 degrees of freedom on (Abramowitz and Stegun 1964, 26.7.5)."""
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / freedom**k for k, term in enumerate(terms))
