"""Play a workload against a running server: one request at each arrival, whatever became of those before."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from server.bench.client import Client, until
from server.bench.photos import Photos
from server.bench.records import Records
from server.simulation.workload import Workload

LEAD_S = 0.1  # from the start to the time that arrivals count from
PATIENCE_S = 5.0  # beyond its budget that a request may wait: the server should have ended it
MAX_OPEN = 900  # requests at once, within the 1024 files that a process usually may open; more are not sent

Progress = Callable[[int, str], object]  # requests sent, and how it goes
T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run to the end on uvloop, or, where that does not exist, on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


@dataclass(frozen=True, slots=True)
class Played:
    """What became of a workload in one round or several, and by how much the server's counters grew in all."""

    rounds: Sequence[Records]
    counters: Mapping[str, float]


async def play_once(client: Client, workload: Workload, photos: Photos, progress: Progress) -> Played:
    """Play the workload against a server that knows the photos' classes; the client is closed.

    Raises OSError when none answers, ValueError when it is another server or knows other classes.
    """
    with closing(client):
        model = await read_model(client)
        if model["classes"] != list(photos.classes):
            raise ValueError(
                f"the images have other classes than the model {model['name']}: give those it was trained on"
            )
        before = await read_counters(client)
        records = await play(client, workload, photos, progress)
        after = await read_counters(client)
    return Played([records], increase(before, after))


async def play(client: Client, workload: Workload, photos: Photos, progress: Progress) -> Records:
    """Send every request of the workload and wait for the answers."""
    player = _Player(client, photos, workload, Records.blank(workload))
    every = math.ceil(min(workload.rate, len(workload)))  # requests: about a second
    started = time.monotonic() + LEAD_S
    with _short_collections():
        async with asyncio.TaskGroup() as sending:
            for i, arrival_s in enumerate(workload.arrivals_s.tolist()):
                await until(started + arrival_s)
                if player.num_open < MAX_OPEN:
                    sending.create_task(player.send(i, started + arrival_s))
                if i % every == every - 1:
                    progress(i + 1, player.standing(i + 1))
    progress(len(workload), player.standing(len(workload)))
    return player.records


@contextmanager
def _short_collections() -> Iterator[None]:
    """Keep the collector from walking over all that was imported: a tenth of a second, while requests are due."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(slots=True)
class _Player:
    client: Client
    photos: Photos
    workload: Workload
    records: Records
    num_open: int = 0

    async def send(self, i: int, due: float) -> None:
        """Ask for one image and enter the answer, if one comes."""
        self.records.lag_s[i] = time.monotonic() - due
        image, budget_s = int(self.workload.images[i]), float(self.workload.budgets_s[i])
        headers = {"X-Latency-Budget-Ms": f"{1000 * budget_s:g}"}
        self.num_open += 1
        try:
            async with asyncio.timeout(budget_s + PATIENCE_S):
                reply = await self.client.request("POST", "/v1/classify?top_k=1", self.photos.encoded[image], headers)
        except OSError:  # of which a timeout is one
            return
        finally:
            self.num_open -= 1
        self.records.note(i, reply, int(self.photos.labels[image]))

    def standing(self, num_sent: int) -> str:
        """How it goes, judged by what is settled; those under way count as not yet in time."""
        in_time, effective = self.records.in_time[:num_sent], self.records.effective[:num_sent]
        return f"{in_time.mean():.1%} in time, {effective.mean():.1%} correct in time"


async def read_model(client: Client) -> dict[str, Any]:
    """The server's card. Raises OSError when none answers, ValueError when it is another server."""
    reply = await client.get("/v1/model")
    if reply.status != 200:
        raise ValueError(
            f"{client.host}:{client.port} answers /v1/model with {reply.status}: give a scala-serve server"
        )
    model: dict[str, Any] = reply.json()
    return model


async def read_metrics(client: Client) -> dict[str, float]:
    """The server's own samples, ``scala_*`` with their labels; none where it does not show them."""
    reply = await client.get("/metrics")
    samples = (line.rpartition(" ") for line in reply.body.decode().splitlines() if line.startswith("scala_"))
    return {name: float(value) for name, _, value in samples}


async def read_counters(client: Client) -> dict[str, float]:
    """Those that only grow: ``scala_*_total``, and the buckets of histograms, ``scala_*_bucket``."""
    samples = (await read_metrics(client)).items()
    return {name: value for name, value in samples if name.partition("{")[0].endswith(("_total", "_bucket"))}


def increase(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """By how much each counter grew, those that did."""
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return {name: value for name, value in sorted(grown.items()) if value}
