"""One bounded queue, ordered by deadline (earliest first), of images that are decoded and wait for the device."""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import Iterable

from server.types import Job, Waiting


class RequestQueue:
    """A job leaves when a batch takes it, or by itself when its answer is settled: expired, refused or abandoned."""

    def __init__(self) -> None:
        self._jobs: list[tuple[float, int, Job]] = []
        self._next = 0
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job) -> None:
        self._next += 1
        insort(self._jobs, (job.terms.order_by, self._next, job))
        job.answer.add_done_callback(lambda _: self._discard(job))
        self._arrived.set()

    async def wait(self) -> None:
        """Return once a job waits."""
        while not self._jobs:
            self._arrived.clear()
            await self._arrived.wait()

    def postpone_overdue(self, now: float) -> None:
        """Order by ``deadline`` whoever missed his ``order_by``: late already, he must not make others late."""
        while self._jobs and self._jobs[0][0] <= now < self._jobs[0][2].terms.deadline:
            _, number, job = self._jobs.pop(0)
            insort(self._jobs, (job.terms.deadline, number, job))

    def view(self) -> list[Waiting]:
        """The queue as policies see it; positions index ``take``."""
        return [job.waiting for _, _, job in self._jobs]

    def ahead_of(self, order_by: float) -> int:
        """How many images would run before one ordered by ``order_by``."""
        return sum(1 for key, _, _ in self._jobs if key <= order_by)

    def take(self, positions: Iterable[int]) -> list[Job]:
        """Remove and return the jobs at these positions of the last ``view``."""
        chosen = [self._jobs[i] for i in positions]
        for entry in chosen:
            self._jobs.remove(entry)
        return [job for _, _, job in chosen]

    def drop_all(self) -> list[Job]:
        return self.take(range(len(self._jobs)))

    def _discard(self, job: Job) -> None:
        self._jobs = [entry for entry in self._jobs if entry[2] is not job]
