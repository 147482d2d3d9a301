"""How soon a new replica answers: alone on the machine, and beside one that is kept busy on the same cores.

    python -m benchmarks.cold_start [--checkpoint DIR] [--runs N] [--callers N]

From the start of the process to its first 200 of ``/v1/classify``, asked every 20 ms: with nothing remembered of
earlier starts, and with the latencies that one has measured. The four cases take turns, every other round backwards, so
that a machine that gets slower does so to all of them. The busy replica has ``--callers`` in closed loop, and is idle
while others start alone. Prints each start and, as the last line, one JSON object with medians in seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.peer_servers import free_port
from benchmarks.quote import noise
from scala_model.checkpoint import default_checkpoint
from server.bench.client import Client, closed_loop
from server.bench.compare import order_of_play
from server.bench.play import run

POLL_EVERY_S, TIMEOUT_S = 0.02, 120.0
REST_S = 0.5  # before a start: what ran before is over
GOAL_S, GOAL_RATIO = 5.0, 2.0


class Case(NamedTuple):
    """One way to start. ``remembers``: an earlier start's latencies are there."""

    busy: bool
    remembers: bool

    @property
    def name(self) -> str:
        return ("busy" if self.busy else "alone") + ("_cached" if self.remembers else "")


CASES = [Case(busy, remembers) for remembers in (False, True) for busy in (False, True)]


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds to the first answer, of each round of each case, by its name."""

    seconds: Mapping[str, Sequence[float]]

    def as_json(self) -> dict[str, object]:
        """``ratio``: busy over alone, the median of the rounds, each with its neighbour in time."""
        medians = {f"{name}_s": round(median(runs), 3) for name, runs in self.seconds.items()}
        ratios = {f"ratio{suffix}": round(self._ratio(suffix), 3) for suffix in ("", "_cached")}
        worst = max(median(self.seconds[case.name]) for case in CASES if case.busy)
        goals_met = worst <= GOAL_S and max(ratios.values()) <= GOAL_RATIO
        rounds = {name: [round(seconds, 3) for seconds in runs] for name, runs in self.seconds.items()}
        return {**medians, **ratios, "goals_met": goals_met, "rounds": rounds}

    def _ratio(self, suffix: str) -> float:
        pairs = zip(self.seconds[f"busy{suffix}"], self.seconds[f"alone{suffix}"], strict=True)
        return median(busy / alone for busy, alone in pairs)


async def measure(checkpoint: Path, num_runs: int, callers: int) -> Measured:
    """Raises RuntimeError for a server that ends by itself or does not answer in two minutes."""
    seconds: dict[str, list[float]] = {case.name: [] for case in CASES}
    by_name = {case.name: case for case in CASES}
    with tempfile.TemporaryDirectory() as known, server(checkpoint, Path(known)) as (port, process):
        await first_answer(port, process)
        await remembered(Path(known), process)
        for name in order_of_play([*by_name], num_runs):
            await asyncio.sleep(REST_S)
            seconds[name].append(await timed_start(by_name[name], checkpoint, Path(known), port, callers))
            print(f"{name:14} {seconds[name][-1]:6.2f} s", flush=True)
    return Measured(seconds)


async def timed_start(case: Case, checkpoint: Path, known: Path, neighbour: int, callers: int) -> float:
    with tempfile.TemporaryDirectory() as nothing:
        async with crowd(neighbour, callers if case.busy else 0):
            started = time.monotonic()
            with server(checkpoint, known if case.remembers else Path(nothing)) as (port, process):
                await first_answer(port, process)
                return time.monotonic() - started


class crowd:  # noqa: N801
    """So many callers in closed loop, for as long as the block lasts."""

    def __init__(self, port: int, callers: int) -> None:
        self._client, self._callers = Client(port), callers

    async def __aenter__(self) -> None:
        asking = closed_loop(self._client, [noise()], {}, concurrency=self._callers, seconds=TIMEOUT_S)
        self._asking = asyncio.create_task(asking)
        await asyncio.sleep(REST_S if self._callers else 0)

    async def __aexit__(self, *_: object) -> None:
        self._asking.cancel()
        with suppress(asyncio.CancelledError):
            await self._asking
        self._client.close()


@contextmanager
def server(checkpoint: Path, profiles: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A server with default settings otherwise, just started; killed at the end."""
    port = free_port()
    options = {"port": port, "checkpoint": checkpoint, "profile-dir": profiles, "log-level": "warning"}
    command = [sys.executable, "-m", "server", "serve"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SCALA_")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        yield port, process
    finally:
        process.kill()
        process.wait()


async def first_answer(port: int, process: subprocess.Popen[bytes]) -> None:
    image, until = noise(), time.monotonic() + TIMEOUT_S
    with closing(Client(port)) as client:
        while time.monotonic() < until and process.poll() is None:
            with suppress(OSError):
                if (await client.classify(image, {})).status == 200:
                    return
            await asyncio.sleep(POLL_EVERY_S)
    raise RuntimeError(f"the server did not answer (exit code {process.poll()}): see what it wrote above")


async def remembered(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Return once the server has measured everything and kept it."""
    until = time.monotonic() + TIMEOUT_S
    while not list(folder.glob("latency-*.json")):
        if time.monotonic() > until or process.poll() is not None:
            raise RuntimeError("the server did not keep what it measured: see what it wrote above")
        await asyncio.sleep(POLL_EVERY_S)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, default=default_checkpoint(), metavar="DIR", help="default: the package's own"
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each case; default: %(default)s")
    parser.add_argument("--callers", type=int, default=8, metavar="N", help="of the busy replica; default: %(default)s")
    options = parser.parse_args(arguments)
    if options.runs < 1 or options.callers < 1:
        parser.error("--runs and --callers are 1 or more")
    print(json.dumps(run(measure(options.checkpoint, options.runs, options.callers)).as_json()))


if __name__ == "__main__":
    main()
