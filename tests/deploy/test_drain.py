"""Two real replicas behind a real load balancer that learns late who leaves, as a cluster's does: nobody is lost.

A request is lost when it has no answer, or another than 200 or 429. Requests leave in open loop, every other one on a
connection of its own. The balancer retries nothing, and is told of a replica's leaving only some time after
its SIGTERM. That it would lose some if the server left at once is tested too.
"""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from server.bench.client import Client, until
from server.bench.play import read_metrics
from tests.deploy.balancers import Balancer, Proxy, ReloadedProxy, ServiceLike, found
from tests.service.service_process import Running, draw_photos, free_port, serving

pytestmark = pytest.mark.service

RATE = 50.0  # requests/s
PATIENCE_S = 15.0
CALM_S = 1.5  # of load before anybody leaves, to see what the machine can do
LEARNS_AFTER_S, GRACE_S = 1.5, 3.0
ALL = pytest.mark.parametrize("kind", [ServiceLike, Proxy, ReloadedProxy])
PHOTOS = draw_photos(8)


class Answer(NamedTuple):
    """``outcome``: a status, or an error. ``at``: an instant."""

    outcome: str
    at: float


class Replicas:
    """Two servers, each on a port of its own that it keeps when it is started anew."""

    def __init__(self, folder: Path, stack: ExitStack, grace_s: float) -> None:
        self._folder, self._stack, self.grace_s = folder, stack, grace_s
        self.first_left_at = math.inf  # when one was first told to leave
        self.ports = (free_port(), free_port())
        self.running = [self._start(port) for port in self.ports]
        for running in self.running:
            running.wait_ready()

    def start_anew(self, place: int) -> None:
        self.running[place] = self._start(self.ports[place])
        self.running[place].wait_ready()

    def _start(self, port: int) -> Running:
        settings = {"DRAIN_GRACE_S": f"{self.grace_s}", "NUM_THREADS": "1"}
        return self._stack.enter_context(serving(self._folder / f"{port}.log", port=port, **settings))


@contextmanager
def balanced(kind: Callable[..., Balancer], folder: Path, grace_s: float) -> Iterator[tuple[Balancer, Replicas]]:
    with ExitStack() as stack:
        replicas = Replicas(folder, stack, grace_s)
        balancer = kind(folder, replicas.ports)
        stack.enter_context(balancer.running())
        yield balancer, replicas


@ALL
def test_a_replica_leaves_and_nobody_is_lost(kind: type[Balancer], tmp_path: Path) -> None:
    found(kind.program)
    with balanced(kind, tmp_path, GRACE_S) as (balancer, replicas):
        answers = asyncio.run(under_load(balancer, leave(balancer, replicas, 0, signal.SIGTERM)))
        assert replicas.running[0].process.returncode == 0
    assert_none_lost(answers, replicas)


def test_a_rolling_restart_loses_nobody(tmp_path: Path) -> None:
    """Tried behind TCP alone: with the proxies, too, this file would take half as long again."""
    found(ServiceLike.program)
    with balanced(ServiceLike, tmp_path, GRACE_S) as (balancer, replicas):

        async def roll() -> None:
            for place in (0, 1):
                await leave(balancer, replicas, place, signal.SIGTERM)
                await asyncio.to_thread(replicas.start_anew, place)
                balancer.route_to(replicas.ports)
                await asyncio.sleep(0.5)

        answers = asyncio.run(under_load(balancer, roll()))
    assert_none_lost(answers, replicas)


@pytest.mark.parametrize("kind", [ServiceLike, ReloadedProxy])
def test_a_replica_that_is_killed_loses_some(kind: type[Balancer], tmp_path: Path) -> None:
    """Or the tests above could not fail."""
    found(kind.program)
    with balanced(kind, tmp_path, GRACE_S) as (balancer, replicas):
        answers = asyncio.run(under_load(balancer, leave(balancer, replicas, 0, signal.SIGKILL)))
    assert_some_lost(answers)


def test_without_a_grace_some_are_lost(tmp_path: Path) -> None:
    """What the grace is for."""
    found(ServiceLike.program)
    with balanced(ServiceLike, tmp_path, 0) as (balancer, replicas):
        answers = asyncio.run(under_load(balancer, leave(balancer, replicas, 0, signal.SIGTERM)))
    assert_some_lost(answers)


def assert_none_lost(answers: list[Answer], replicas: Replicas) -> None:
    """And next to nobody refused for load (429), which leaving is no reason for."""
    outcomes = Counter(answer.outcome for answer in answers)
    assert num_lost(outcomes) == 0, outcomes
    if outcomes["200"] < 0.95 * len(answers):
        before = Counter(answer.outcome for answer in answers if answer.at < replicas.first_left_at)
        if before["429"]:
            pytest.skip(f"refused before anybody left: {before}; the machine is too busy to tell anything")
        raise AssertionError(f"refused once one left: {outcomes}")


def assert_some_lost(answers: list[Answer]) -> None:
    """Half of those that came while the balancer did not know."""
    outcomes = Counter(answer.outcome for answer in answers)
    assert num_lost(outcomes) > 0.2 * RATE * LEARNS_AFTER_S, outcomes


def num_lost(outcomes: Counter[str]) -> int:
    return sum(count for outcome, count in outcomes.items() if outcome not in ("200", "429"))


async def leave(balancer: Balancer, replicas: Replicas, place: int, how: signal.Signals) -> None:
    """One replica is told to leave, and the balancer that it does; returns when it is gone."""
    leaving = replicas.running[place]
    await asyncio.sleep(CALM_S)
    before = await num_answered(leaving)
    leaving.process.send_signal(how)
    signalled = time.monotonic()
    replicas.first_left_at = min(signalled, replicas.first_left_at)
    await asyncio.sleep(LEARNS_AFTER_S)
    balancer.route_to([port for port in replicas.ports if port != leaving.port])
    if how == signal.SIGTERM and replicas.grace_s:
        if (told_after_s := time.monotonic() - signalled) > replicas.grace_s - 0.5:
            pytest.skip(
                f"the balancer heard of it after {told_after_s:.1f} s: the machine is too busy to tell anything"
            )
        assert await num_answered(leaving) > before, "it was still asked"
    await asyncio.to_thread(leaving.process.wait, 20)
    await asyncio.sleep(0.5)


async def num_answered(running: Running) -> float:
    with closing(Client(running.port)) as client:
        return (await read_metrics(client)).get('scala_requests_total{route="/v1/classify",status="200"}', 0.0)


async def under_load(balancer: Balancer, script: Coroutine[Any, Any, None]) -> list[Answer]:
    """To requests at ``RATE``, for as long as the script takes."""
    playing = asyncio.create_task(script)
    sent: list[asyncio.Task[Answer]] = []
    with closing(Client(balancer.port)) as client:
        started = time.monotonic()
        while not playing.done():
            await until(started + len(sent) / RATE)
            sent.append(asyncio.create_task(answer_to(client, len(sent))))
        answers = await asyncio.gather(*sent)
    await playing
    return answers


async def answer_to(client: Client, i: int) -> Answer:
    headers = {"Connection": "close"} if i % 2 else {}
    try:
        async with asyncio.timeout(PATIENCE_S):
            outcome = str((await client.classify(PHOTOS[i % len(PHOTOS)], headers)).status)
    except OSError as error:  # of which a timeout is one
        outcome = repr(error)
    return Answer(outcome, time.monotonic())
