"""One bounded queue, ordered by deadline (earliest first; equals by priority), of decoded images that wait."""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable

from scala_model.width import Width
from server.types import Job, QueueView


class RequestQueue:
    """A job leaves when a batch takes it, or by itself when its answer is settled: expired, refused or abandoned."""

    def __init__(self) -> None:
        self._due: list[float] = []
        self._jobs: list[Job] = []
        self._widths: list[tuple[Width, ...]] = []
        self._kinds: Counter[tuple[Width, ...]] = Counter()
        self._patient = 0  # those ordered by another instant than their deadline
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job, due: float | None = None) -> None:
        """By default, its ``order_by`` is its place."""
        self._insert(job, job.terms.order_by if due is None else due)
        job.answer.add_done_callback(lambda _: self._discard(job))
        self._arrived.set()

    async def wait(self) -> None:
        """Return once a job waits."""
        while not self._jobs:
            self._arrived.clear()
            await self._arrived.wait()

    def postpone_overdue(self, soonest: Callable[[tuple[Width, ...]], float]) -> None:
        """Order by ``deadline`` whoever cannot be answered by his ``order_by``: late already, he must not make others
        late. ``soonest`` tells when an image that allows these widths could be answered."""
        if self._patient:
            instants = {widths: soonest(widths) for widths in self._kinds}
            early = self._jobs[: bisect_left(self._due, max(instants.values()))]
            for job in [job for job in early if job.due < min(instants[job.terms.widths], job.terms.deadline)]:
                self._discard(job)
                self._insert(job, job.terms.deadline)

    def view(self) -> QueueView:
        """The queue as policies see it, until it changes; positions index ``take``."""
        return QueueView(self._due, self._widths, self._kinds)

    def take(self, positions: Iterable[int]) -> list[Job]:
        """Remove and return the jobs at these positions of the last ``view``."""
        chosen = list(positions)
        jobs = [self._jobs[i] for i in chosen]
        for i in sorted(chosen, reverse=True):
            self._remove(i)
        return jobs

    def drop_all(self) -> list[Job]:
        return self.take(range(len(self._jobs)))

    def _insert(self, job: Job, due: float) -> None:
        job.due = due
        place = bisect_right(self._due, due)
        while place and self._due[place - 1] == due and _is_before(job, self._jobs[place - 1]):
            place -= 1
        self._due.insert(place, due)
        self._jobs.insert(place, job)
        self._widths.insert(place, job.terms.widths)
        self._kinds[job.terms.widths] += 1
        self._patient += due < job.terms.deadline

    def _remove(self, place: int) -> None:
        job = self._jobs.pop(place)
        del self._due[place], self._widths[place]
        self._kinds[job.terms.widths] -= 1
        if not self._kinds[job.terms.widths]:
            del self._kinds[job.terms.widths]
        self._patient -= job.due < job.terms.deadline

    def _discard(self, job: Job) -> None:
        for place in range(bisect_left(self._due, job.due), bisect_right(self._due, job.due)):
            if self._jobs[place] is job:
                self._remove(place)
                return


def _is_before(job: Job, other: Job) -> bool:
    """Whether its priority puts it before another image of the same instant that came earlier."""
    return 0 < job.terms.priority < (other.terms.priority or math.inf)
