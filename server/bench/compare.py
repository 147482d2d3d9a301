"""Policies beside each other on a live server: each in a process of its own, the same workload for all, in turns."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

from server.bench.client import Client
from server.bench.photos import Photos
from server.bench.play import Played, Progress, play_once, read_metrics, read_model, run
from server.bench.records import Records
from server.engine import CPU_BATCH, GPU_BATCH
from server.settings import Settings
from server.simulation.workload import Workload

POLL_EVERY_S, TIMEOUT_S = 0.1, 300.0
SETTLED_S = 30.0  # without a new cell: some width has no memory for the largest batch
REST_S = 1.0  # before each turn


@dataclass(frozen=True, slots=True)
class Running:
    """A warm server on this machine, whose process is the server itself."""

    port: int
    pid: int


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
    with ExitStack() as stack:
        servers = {policy: stack.enter_context(serving(policy, server_cpus)) for policy in policies}
        stack.enter_context(pinned(sorted(available_cpus() - set(server_cpus)) or server_cpus))
        return take_turns(servers, workload, photos, num_rounds=num_rounds, progress=progress)


def take_turns(
    servers: Mapping[str, Running], workload: Workload, photos: Photos, *, num_rounds: int, progress: Progress
) -> dict[str, Played]:
    """What ``compare_policies`` does once the servers run, given by their policies."""
    rounds: dict[str, list[Records]] = {policy: [] for policy in servers}
    counters: dict[str, Counter[str]] = {policy: Counter() for policy in servers}
    for turn, policy in enumerate(order_of_play([*servers], num_rounds)):
        time.sleep(REST_S)

        def show(num_sent: int, text: str, before: int = turn * len(workload), policy: str = policy) -> None:
            progress(before + num_sent, f"{policy}: {text}")

        played = run(play_once(Client(servers[policy].port), workload, photos, show))
        rounds[policy] += played.rounds
        counters[policy].update(played.counters)
    return {policy: Played(rounds[policy], dict(counters[policy])) for policy in servers}


def order_of_play(policies: Sequence[str], num_rounds: int) -> list[str]:
    """Every other round backwards, so that a machine that gets slower does so to all of them alike."""
    return [policy for i in range(num_rounds) for policy in (policies if i % 2 == 0 else reversed(policies))]


@contextmanager
def serving(policy: str, cpus: Sequence[int]) -> Iterator[Running]:
    """A warm server with this policy, on these cores; killed at the end.

    Where decisions are logged, it has a folder of its own for them. Raises what ``compare_policies`` does.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    own = {"HOST": "127.0.0.1", "PORT": str(port), "POLICY": policy, "LOG_LEVEL": "warning"}
    environment = os.environ | {f"SCALA_{name}": value for name, value in own.items()}
    settings = Settings.load(environ=environment)
    if settings.decision_log is not None:
        environment["SCALA_DECISION_LOG"] = str(settings.decision_log / policy.replace(":", "-"))
    with pinned(cpus):  # a process takes after the thread that starts it
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve"], env=environment, stdout=subprocess.DEVNULL
        )
    try:
        run(_warm(process, port, settings))
        yield Running(port, process.pid)
    finally:
        process.kill()
        process.wait()


async def _warm(process: subprocess.Popen[bytes], port: int, settings: Settings) -> None:
    """Wait until the server is ready and has measured the largest batch at every width, or gets no further."""
    before: list[set[str]] = []
    largest, since = settings.max_batch, time.monotonic()
    until = since + TIMEOUT_S
    with closing(Client(port)) as client:
        while (now := time.monotonic()) < until:
            if process.poll() is not None:
                told = f"ended with exit code {process.returncode}: it says why above"
                raise ValueError(f"the server with policy {settings.policy!r} {told}")
            measured = await _measured(client)
            if measured != before:
                before, since = measured, now
            if measured and all(measured):
                largest = largest or await _default_batch(client)
                if all(str(largest) in batches for batches in measured) or now > since + SETTLED_S:
                    return
            await asyncio.sleep(POLL_EVERY_S)
    raise TimeoutError(f"the server with policy {settings.policy!r} was not warm in {TIMEOUT_S:g} s")


async def _measured(client: Client) -> list[set[str]]:
    """The batch sizes that have a latency, of each width; none of any until the server is ready."""
    try:
        if (await client.get("/readyz")).status != 200:
            return []
        return [set(width["latency_ms"]) for width in (await read_model(client))["widths"]]
    except OSError:
        return []


async def _default_batch(client: Client) -> int:
    """The largest batch where none is set: by then, an engine on a GPU holds memory of it."""
    return GPU_BATCH if (await read_metrics(client)).get("scala_gpu_memory_bytes") else CPU_BATCH


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


@contextmanager
def urgent() -> Iterator[bool]:
    """This thread ahead of all ordinary ones, where the system lets it, and whether it does.

    It sends on time from a core that a server keeps busy: late by 0.3 ms at the 99th percentile instead of 4.
    """
    if not hasattr(os, "sched_setscheduler"):
        yield False
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:  # what this thread starts is ordinary again
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        yield False
        return
    try:
        yield True
    finally:
        policy, priority = before  # with the flag, which takes a permission of its own to clear
        os.sched_setscheduler(0, policy | os.SCHED_RESET_ON_FORK, priority)
