"""What became of every request of a workload, as its client saw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from server.bench.client import Reply
from server.simulation.workload import Workload

NO_ANSWER = 0  # the status of a request whose connection broke, or whose client lost patience
REFUSED = (422, 429)  # on arrival: impossible, or for load


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """Columns of N requests. ``lag_s`` is how late each left, ``latency_s`` from then to its answer's last byte.

    They are NaN where nothing left or came, as ``width`` is of all but answers. ``met`` is the server's own word on the
    budget; ``correct`` tells whether its first prediction is the label.
    """

    workload: Workload
    lag_s: NDArray[np.float64]
    latency_s: NDArray[np.float64]
    status: NDArray[np.int64]
    width: NDArray[np.float64]
    correct: NDArray[np.bool_]
    met: NDArray[np.bool_]

    @classmethod
    def blank(cls, workload: Workload) -> Records:
        """Nothing has happened yet."""
        count = len(workload)
        unknown, no = np.full(count, np.nan), np.zeros(count, np.bool_)
        return cls(
            workload, unknown.copy(), unknown.copy(), np.full(count, NO_ANSWER), unknown.copy(), no.copy(), no.copy()
        )

    def note(self, i: int, reply: Reply, label: int) -> None:
        """Enter what request ``i`` was answered."""
        self.latency_s[i], self.status[i] = reply.latency_s, reply.status
        if reply.status == 200:
            body = reply.json()
            self.width[i], self.met[i] = body["width"], body["budget_met"]
            self.correct[i] = body["predictions"][0]["class_id"] == label

    @property
    def answered(self) -> NDArray[np.bool_]:
        answered: NDArray[np.bool_] = self.status == 200
        return answered

    @property
    def admitted(self) -> NDArray[np.bool_]:
        """Neither impossible nor refused for load."""
        return ~np.isin(self.status, REFUSED)

    @property
    def unsent(self) -> NDArray[np.bool_]:
        """Never left: too many were open."""
        unsent: NDArray[np.bool_] = np.isnan(self.lag_s)
        return unsent

    @property
    def in_time(self) -> NDArray[np.bool_]:
        """Answered within the budget, on the client's clock."""
        in_time: NDArray[np.bool_] = self.answered & (self.latency_s <= self.workload.budgets_s)
        return in_time

    @property
    def effective(self) -> NDArray[np.bool_]:
        """Answered correctly and in time."""
        return self.in_time & self.correct


def joined(rounds: Sequence[Records]) -> Records:
    """Rounds one after the other, each beginning when the one before had its last arrival."""
    loads = [played.workload for played in rounds]
    starts = np.cumsum([0.0] + [load.seconds for load in loads[:-1]])
    workload = Workload(
        loads[0].name,
        np.concatenate([load.arrivals_s + start for load, start in zip(loads, starts, strict=True)]),
        np.concatenate([load.budgets_s for load in loads]),
        np.concatenate([load.images for load in loads]),
    )
    columns = ("lag_s", "latency_s", "status", "width", "correct", "met")
    return Records(workload, *(np.concatenate([getattr(played, name) for played in rounds]) for name in columns))


def save(path: Path, records: Records) -> None:
    """Write every column, the workload's too, as a compressed NumPy archive."""
    np.savez_compressed(
        path,
        arrivals_s=records.workload.arrivals_s,
        budgets_s=records.workload.budgets_s,
        images=records.workload.images,
        lag_s=records.lag_s,
        latency_s=records.latency_s,
        status=records.status,
        width=records.width,
        correct=records.correct,
        met=records.met,
    )
