"""Policies beside each other on a live server: each in a process of its own, the same workload for all, in turns."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from server.bench.client import Client
from server.bench.photos import Photos
from server.bench.play import Played, Progress, play_once, read_model, run
from server.bench.records import Records
from server.simulation.workload import Workload

POLL_EVERY_S, TIMEOUT_S = 0.1, 300.0
SETTLED_S = 2.0  # without a new cell of the profile: every width is warmed at every batch size
REST_S = 1.0  # before each turn


def compare_policies(
    policies: Sequence[str],
    workload: Workload,
    photos: Photos,
    *,
    num_rounds: int,
    server_cpus: Sequence[int],
    progress: Progress,
) -> dict[str, Played]:
    """Play the workload ``num_rounds`` times on a server of each policy (``SCALA_POLICY``), in turns: A B C, C B A, ...

    All servers run from the first turn to the last; those whose turn it is not are idle. They share ``server_cpus``,
    and the requests come from the other cores, where there are any. Other settings are those of the environment.
    Raises ValueError for a server that does not start, TimeoutError for one that is not warm in five minutes.
    """
    with ExitStack() as servers:
        ports = {policy: servers.enter_context(serving(policy, server_cpus)) for policy in policies}
        servers.enter_context(pinned(sorted(available_cpus() - set(server_cpus)) or server_cpus))
        rounds: dict[str, list[Records]] = {policy: [] for policy in policies}
        counters: dict[str, Counter[str]] = {policy: Counter() for policy in policies}
        for turn, policy in enumerate(order_of_play(policies, num_rounds)):
            time.sleep(REST_S)

            def show(num_sent: int, text: str, before: int = turn * len(workload), policy: str = policy) -> None:
                progress(before + num_sent, f"{policy}: {text}")

            played = run(play_once(Client(ports[policy]), workload, photos, show))
            rounds[policy] += played.rounds
            counters[policy].update(played.counters)
    return {policy: Played(rounds[policy], dict(counters[policy])) for policy in policies}


def order_of_play(policies: Sequence[str], num_rounds: int) -> list[str]:
    """Every other round backwards, so that a machine that gets slower does so to all of them alike."""
    return [policy for i in range(num_rounds) for policy in (policies if i % 2 == 0 else reversed(policies))]


@contextmanager
def serving(policy: str, cpus: Sequence[int]) -> Iterator[int]:
    """The port of a warm server with this policy, on these cores; killed at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    own = {"HOST": "127.0.0.1", "PORT": str(port), "POLICY": policy, "LOG_LEVEL": "warning"}
    environment = os.environ | {f"SCALA_{name}": value for name, value in own.items()}
    with pinned(cpus):  # a process takes after the thread that starts it
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve"], env=environment, stdout=subprocess.DEVNULL
        )
    try:
        run(_warm(process, port, policy))
        yield port
    finally:
        process.kill()
        process.wait()


async def _warm(process: subprocess.Popen[bytes], port: int, policy: str) -> None:
    """Wait until the server is ready and its profile stops growing."""
    num_cells, since = 0, time.monotonic()
    until = since + TIMEOUT_S
    with closing(Client(port)) as client:
        while time.monotonic() < until:
            if process.poll() is not None:
                code = process.returncode
                raise ValueError(f"the server with policy {policy!r} ended with exit code {code}: it says why above")
            found = await _num_cells(client)
            if found != num_cells:
                num_cells, since = found, time.monotonic()
            if num_cells and time.monotonic() > since + SETTLED_S:
                return
            await asyncio.sleep(POLL_EVERY_S)
    raise TimeoutError(f"the server with policy {policy!r} was not warm in {TIMEOUT_S:g} s")


async def _num_cells(client: Client) -> int:
    """How many (width, batch) have a latency; 0 until the server is ready and every width has one."""
    try:
        if (await client.get("/readyz")).status != 200:
            return 0
        widths: list[dict[str, Any]] = (await read_model(client))["widths"]
    except OSError:
        return 0
    cells = [len(width["latency_ms"]) for width in widths]
    return sum(cells) if all(cells) else 0


def available_cpus() -> set[int]:
    """The cores that this process may run on; those of the machine, where a system does not tell."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


@contextmanager
def pinned(cpus: Sequence[int]) -> Iterator[None]:
    """This thread, and what it starts, on these cores; nothing where a system does not pin."""
    before = available_cpus()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, before)
