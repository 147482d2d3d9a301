"""Load from this process, cheap enough for the core beside the server's, and what became of it."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from server.bench.client import Client, Reply, closed_loop
from tests.service.service_process import Running, serving

FORESEEN = {200, 429, 503, 504}
MAX_OPEN = 900  # requests at once, within the 1024 files that a process usually may open


@dataclass(slots=True)
class Outcome:
    """``lost`` had no answer at all, ``unsent`` found ``MAX_OPEN`` others waiting; ``lag_s`` is the latest sending."""

    statuses: Counter[int] = field(default_factory=Counter)
    met: int = 0
    lost: int = 0
    unsent: int = 0
    lag_s: float = 0.0
    latencies_s: list[tuple[float, float]] = field(default_factory=list)  # after the start, when each was sent

    @property
    def sent(self) -> int:
        return self.statuses.total() + self.lost

    @property
    def unforeseen(self) -> int:
        return self.lost + sum(count for status, count in self.statuses.items() if status not in FORESEEN)

    def lateness_ms(self, budget_ms: float, begin_s: float = 0.0, end_s: float = inf) -> list[float]:
        """By how much each answer to what was sent in between came after its budget; negative if it came before."""
        return [1000 * took_s - budget_ms for sent_s, took_s in self.latencies_s if begin_s <= sent_s < end_s]

    def add(self, reply: Reply) -> None:
        self.statuses[reply.status] += 1
        self.met += reply.status == 200 and reply.headers["x-budget-met"] == "true"


def poisson(rate: float, seconds: float, seed: int, *, start_s: float = 0.0) -> list[float]:
    """Arrival times of so many requests a second on average, from ``start_s`` on."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, size=int(2 * rate * seconds) + 10)
    times = np.cumsum(gaps)
    return [start_s + float(time_s) for time_s in times[times < seconds]]


async def play(port: int, images: Sequence[bytes], budget_ms: float, arrivals_s: Iterable[float]) -> Outcome:
    """One request at each arrival, whatever became of those before. It leaves up to a millisecond late."""
    outcome, supply, started = Outcome(), itertools.cycle(images), time.monotonic()
    headers, client = {"X-Latency-Budget-Ms": f"{budget_ms:g}"}, Client(port)
    pending: set[asyncio.Task[None]] = set()

    async def send(image: bytes) -> None:
        try:
            reply = await client.classify(image, headers)
            outcome.add(reply)
            outcome.latencies_s.append((time.monotonic() - reply.latency_s - started, reply.latency_s))
        except OSError:
            outcome.lost += 1

    with closing(client):
        for arrival_s in arrivals_s:
            if (wait_s := started + arrival_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            outcome.lag_s = max(outcome.lag_s, time.monotonic() - started - arrival_s)
            if len(pending) >= MAX_OPEN:
                outcome.unsent += 1
                await asyncio.sleep(0)
                continue
            task = asyncio.create_task(send(next(supply)))
            pending.add(task)
            task.add_done_callback(pending.discard)
        await asyncio.gather(*pending)
    return outcome


async def saturate(port: int, images: Sequence[bytes], width: float, seconds: float) -> tuple[float, Outcome]:
    """Images/s at one width for sixteen callers without pause, who have all the time in the world."""
    headers, outcome = {"X-Width": f"{width:g}", "X-Latency-Budget-Ms": "20000"}, Outcome()
    with closing(Client(port)) as client:
        started = time.monotonic()
        for reply in await closed_loop(client, images, headers, concurrency=16, seconds=seconds):
            outcome.add(reply)
        return outcome.statuses[200] / (time.monotonic() - started), outcome


@contextmanager
def serving_apart(log: Path, **given: Any) -> Iterator[Running]:
    """A warm server on the last core, all that we do on the others; where there is only one, they share it.

    Takes what ``serving`` does.
    """
    cores = sorted(os.sched_getaffinity(0))
    within = ("taskset", "--cpu-list", str(cores[-1])) if shutil.which("taskset") else ()
    with serving(log, within=within, **given) as server:
        server.wait_measured()
        os.sched_setaffinity(0, cores[:-1] or cores)
        try:
            yield server
        finally:
            os.sched_setaffinity(0, cores)
