"""Many jobs, run side by side in processes and kept on disk, so that none is run twice.

A job is known by a hash of all that its result depends on: the function, its arguments, and the source code of what is
simulated. A study that was stopped goes on where it was; one whose inputs changed runs what they touch.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from server.simulation.device import Machine
from server.simulation.scenarios import Scenario

Name = TypeVar("Name", bound=Hashable)
Progress = Callable[[int, int, str], object]  # done, of how many, what was done last
ROOT = Path(__file__).parents[2]
SIMULATED = (
    "scala_model/width.py",
    "server/types.py",
    "server/latency_profile.py",
    "server/policies/deadlines.py",
    "server/simulation/simulator.py",
    "server/simulation/workload.py",
    "server/simulation/device.py",
    "server/simulation/scenarios.py",
    "server/simulation/experiment.py",
    "server/simulation/oracle.py",
    "server/simulation/baselines/*.py",
)
OUR_SERVER = (
    "server/policies/*.py",
    "server/planner.py",
    "server/load_monitor.py",
    "server/simulation/adaptive_server.py",
)


@dataclass(frozen=True, slots=True)
class Job:
    """A function of a module, of what can be sent to another process, to what can be written as JSON.

    ``label`` tells people; ``sources``: patterns of the files that decide the result.
    """

    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    sources: tuple[str, ...] = SIMULATED

    def key(self, code: str) -> str:
        """``code`` is the digest of the sources."""
        told = [self.function.__name__, _told(self.arguments), code]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]


class Study:
    """Runs jobs in ``num_processes``; ``folder`` receives the results, a line of JSON each, in ``results.jsonl``.

    A line that a stop has cut off is no result. Raises OSError where the folder cannot be written to.
    """

    def __init__(self, folder: Path, num_processes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._num_processes = folder / "results.jsonl", num_processes
        kept = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        self._known = dict(_parsed(kept))
        if kept and not kept.endswith("\n"):
            self._append("")

    def run(self, jobs: Mapping[Name, Job], progress: Progress) -> dict[Name, Any]:
        """The result of each job, by its name, in the order given. A job that fails ends the study with its error."""
        codes = {sources: _digest_of(sources) for sources in {job.sources for job in jobs.values()}}
        keys = {name: job.key(codes[job.sources]) for name, job in jobs.items()}
        missing = {keys[name]: job for name, job in jobs.items() if keys[name] not in self._known}
        done = len(jobs) - len(missing)
        progress(done, len(jobs), "")
        for key, value in self._results_of(missing) if missing else ():
            self._keep(key, missing[key].label, value)
            progress(done := done + 1, len(jobs), missing[key].label)
        return {name: self._known[key] for name, key in keys.items()}

    def _results_of(self, jobs: Mapping[str, Job]) -> Iterator[tuple[str, Any]]:
        """As they come in. Processes are spawned, not forked, because a progress bar has a thread."""
        if self._num_processes == 1:
            yield from ((key, job.function(*job.arguments)) for key, job in jobs.items())
            return
        with ProcessPoolExecutor(self._num_processes, multiprocessing.get_context("spawn")) as pool:
            running = {pool.submit(job.function, *job.arguments): key for key, job in jobs.items()}
            try:
                for future in as_completed(running):
                    yield running[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _keep(self, key: str, label: str, value: Any) -> None:
        line = json.dumps({"key": key, "label": label, "result": value})
        self._append(line)
        self._known[key] = json.loads(line)["result"]  # as it will be read the next time

    def _append(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _parsed(kept: str) -> Iterator[tuple[str, Any]]:
    for line in kept.splitlines():
        try:
            told = json.loads(line)
            yield told["key"], told["result"]
        except (ValueError, KeyError, TypeError):
            continue


def _told(argument: Any) -> Any:
    """What of it a result depends on; a scenario's recording is read."""
    if isinstance(argument, tuple):
        return [_told(one) for one in argument]
    return argument.digest if isinstance(argument, Machine | Scenario) else repr(argument)


def _digest_of(sources: tuple[str, ...]) -> str:
    files = sorted({file for pattern in sources for file in ROOT.glob(pattern)})
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
