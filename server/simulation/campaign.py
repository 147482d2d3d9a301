"""All policies on all scenarios: parameters are chosen first, on seeds of their own, then everybody plays the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from statistics import fmean

from server.simulation.baselines import Tuning, tunings
from server.simulation.baselines.tuning import EDF
from server.simulation.device import Machine
from server.simulation.experiment import OURS, STATIC, Interval, Result, bound, paired, run, switching
from server.simulation.scenarios import Scenario, ladder, training
from server.simulation.study import OUR_SERVER, SIMULATED, Job, Progress, Study

FEW = f"{OURS},{STATIC},F-*[0-9],CW-*[0-9],AS-*,SF-*,MB*,TH*,MS*"  # fixed widths in their own queues only
FIXED = ("fixed:", "F-", "TR-", "C+-", "CW-", "AS-")
TRAINING = (1001, 1002)  # seeds, far from those that are reported
BOUND = "bound"


@dataclass(frozen=True)
class Comparison:
    """One scenario on one machine: for every policy its results, one a seed, and what none can exceed, one a seed."""

    machine: Machine
    scenario: Scenario
    results: Mapping[str, Sequence[Result]]
    bounds: Sequence[float]

    def mean(self, policy: str, measure: str = "expected_accuracy") -> float:
        return fmean(getattr(result, measure) for result in self.results[policy])

    def best(self, *prefixes: str) -> str | None:
        """The policy of most expected accuracy among those whose names begin so, chosen in hindsight; None: no such."""
        names = [name for name in self.results if name.startswith(prefixes)]
        return max(names, key=self.mean, default=None)

    def ahead_of(self, policy: str) -> Interval:
        """Expected accuracy of ours less that of the other."""
        ours, other = ([result.expected_accuracy for result in self.results[name]] for name in (OURS, policy))
        return paired(ours, other)

    @property
    def bound(self) -> float:
        return fmean(self.bounds)


def chosen(names: Iterable[str], patterns: str, what: str) -> list[str]:
    """The names that one of the comma-separated patterns matches. Raises ValueError for a pattern that matches none."""
    names = list(names)
    picked: set[str] = set()
    for pattern in patterns.split(","):
        matching = {name for name in names if fnmatchcase(name, pattern.strip())}
        if not matching:
            raise ValueError(f"no {what} is called {pattern!r}; there are {', '.join(names)}")
        picked |= matching
    return [name for name in names if name in picked]


def tune(study: Study, machine: Machine, names: Sequence[str], *, full: bool, progress: Progress) -> dict[str, Tuning]:
    """For each policy the parameters of most expected accuracy in training; the defaults where it has none."""
    steps = tuple(ladder(machine, full=full))
    tables = study.run(
        {
            name: Job(f"{machine.name}: rates for {name}", switching, (machine, steps, name.endswith(EDF), TRAINING[0]))
            for name in names
            if name.startswith("MS")
        },
        progress,
    )
    start = {name: Tuning(switching=tuple(map(tuple, tables.get(name, ())))) for name in names}
    tried = {name: tunings(name, tuning) for name, tuning in start.items() if len(tunings(name, tuning)) > 1}
    scores = study.run(
        {
            (name, tuning, scenario.load, seed): _job(machine, scenario, name, tuning, seed)
            for name, candidates in tried.items()
            for tuning in candidates
            for scenario in training(machine, full=full)
            for seed in TRAINING
        },
        progress,
    )

    def worth(name: str, tuning: Tuning) -> float:
        return fmean(score["expected_accuracy"] for key, score in scores.items() if key[:2] == (name, tuning))

    return start | {name: max(tried[name], key=lambda tuning: worth(name, tuning)) for name in tried}


def compare(
    study: Study,
    machine: Machine,
    scenarios: Sequence[Scenario],
    tuned: Mapping[str, Tuning],
    num_seeds: int,
    progress: Progress,
) -> list[Comparison]:
    """Every policy of ``tuned`` on every scenario, ``num_seeds`` times. What learns nothing is for mishaps only."""
    seeds = range(num_seeds)
    jobs = {
        (scenario, name, seed): _job(machine, scenario, name, tuning, seed)
        for scenario in scenarios
        for seed in seeds
        for name, tuning in tuned.items()
        if name != STATIC or scenario.mishap
    }
    bounds = {
        (scenario, BOUND, seed): Job(f"{machine.name}: {scenario.label}, bound", bound, (machine, scenario, seed))
        for scenario in scenarios
        for seed in seeds
    }
    found = study.run(jobs | bounds, progress)
    return [
        Comparison(
            machine,
            scenario,
            {
                name: [Result(**found[scenario, name, seed]) for seed in seeds]
                for name in tuned
                if (scenario, name, 0) in jobs
            },
            [found[scenario, BOUND, seed] for seed in seeds],
        )
        for scenario in scenarios
    ]


def _job(machine: Machine, scenario: Scenario, name: str, tuning: Tuning, seed: int) -> Job:
    is_ours = name in (OURS, STATIC, "slackfit", "threshold") or name.startswith("fixed:")
    label = f"{machine.name}: {scenario.label}, {name}"
    return Job(label, run_as_json, (machine, scenario, name, tuning, seed), SIMULATED + OUR_SERVER * is_ours)


def run_as_json(machine: Machine, scenario: Scenario, policy: str, tuning: Tuning, seed: int) -> dict[str, float]:
    return asdict(run(machine, scenario, policy, tuning, seed))
