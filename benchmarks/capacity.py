"""What one replica serves: requests a second at each width over HTTP, on one core and on more, and its memory.

    python -m benchmarks.capacity [--checkpoint DIR] [--cores N ...] [--rounds N] [--seconds S] [--markdown FILE.md]

A server for each number of cores, pinned to as many, with as many engine threads. wrk has sixteen callers in closed
loop that pin a width (``X-Width``) and all send the same JPEG of 64 px. Servers and widths take turns, every other
round backwards, and who has none is halted. wrk runs on the machine's last core, which the largest server has, too.
Latencies of a batch are the server's own, from ``/v1/model`` after the load.

Two minutes and a half on two cores, with the checkpoint that comes with the package. Needs wrk.

Prints tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.dated_file import Lines, dated_file, say, setting_of, show
from benchmarks.peer_load import CALLERS, SCRIPT, Turn, play
from benchmarks.peer_servers import Running
from benchmarks.quote import noise
from scala_model.checkpoint import default_checkpoint, read_card
from server.bench.compare import available_cpus, order_of_play, pinned, serving
from server.machine import cpu_name

PACKAGES = ("openvino", "uvicorn")
WARM_S = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One width on so many cores. ``batches_ms``: p50 and p99 of each measured batch size, as in ``/v1/model``."""

    cores: int
    width: str
    turns: Sequence[Turn]
    batches_ms: Mapping[str, Mapping[str, float]]

    def middle(self, figure: str) -> float:
        """The median of the rounds."""
        return float(median(getattr(turn, figure) for turn in self.turns))

    def cells(self) -> list[str]:
        rates = [turn.rate for turn in self.turns]
        return [
            str(self.cores),
            self.width,
            f"{self.middle('rate'):.0f}",
            f"{min(rates):.0f}–{max(rates):.0f}",
            f"{self.middle('p50_ms'):.0f} / {self.middle('p99_ms'):.0f}",
            *(self._batch(size) for size in ("1", "16")),
            str(sum(turn.failed for turn in self.turns)),
        ]

    def _batch(self, size: str) -> str:
        known = self.batches_ms.get(size)
        return "not measured" if known is None else f"{known['p50']:.2f} / {known['p99']:.2f}"


HEADING = (
    "cores",
    "width",
    "requests/s",
    "least–most",
    "p50 / p99 ms",
    "batch of 1, p50 / p99 ms",
    "of 16",
    "failed",
)


def table(rows: Sequence[Row]) -> Lines:
    return [HEADING, *(row.cells() for row in rows)]


@dataclass(frozen=True, slots=True)
class Measured:
    """``memory``: of each server, by its cores, the most MiB that its processes had resident at the end of a turn."""

    rows: Sequence[Row]
    memory: Mapping[int, float]

    def sentences(self) -> list[str]:
        return [f"Resident with {cores} cores: {mib:.0f} MiB at most." for cores, mib in self.memory.items()]

    def as_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "rate": round(row.middle("rate"), 1)} for row in self.rows]
        return {"rows": rows, "memory_mib": {str(cores): round(mib) for cores, mib in self.memory.items()}}


class Bench:
    """``servers`` by their cores, all warm and halted. ``folder`` is for files that nobody keeps."""

    def __init__(self, servers: Mapping[int, Running], folder: Path) -> None:
        self._servers, self._memory = servers, dict.fromkeys(servers, 0.0)
        self._image, self._script = folder / "image.jpg", folder / "post.lua"
        self._image.write_bytes(noise())
        self._script.write_text(SCRIPT, encoding="utf-8")

    def measure(self, widths: Sequence[str], rounds: int, seconds: int) -> Measured:
        """Raises RuntimeError or ValueError for a server that does not serve."""
        cases = {f"{cores} cores, width {width}": (cores, width) for cores in self._servers for width in widths}
        turns: dict[str, list[Turn]] = {name: [] for name in cases}
        for case in cases.values():
            self._play(*case, WARM_S)
        for name in order_of_play([*cases], rounds):
            turns[name].append(self._play(*cases[name], seconds))
            say(f"{name}: {turns[name][-1].rate:.0f}/s")
        known = {cores: batches_of(server) for cores, server in self._servers.items()}
        rows = [Row(cores, width, turns[name], known[cores][width]) for name, (cores, width) in cases.items()]
        return Measured(rows, self._memory)

    def _play(self, cores: int, width: str, seconds: int) -> Turn:
        server = replace(self._servers[cores], headers={"X-Width": width})
        turn = play(server, self._image, self._script, seconds)
        self._memory[cores] = max(self._memory[cores], resident_mib(server))
        return turn


def resident_mib(server: Running) -> float:
    """Of all its processes: one that makes a plan comes and goes."""
    return float(sum(process.memory_info().rss for process in server.processes())) / 2**20


def batches_of(server: Running) -> dict[str, dict[str, dict[str, float]]]:
    """p50 and p99 in ms, by width and batch size. The server is let go for the answer, and halted again."""
    server.go_on()
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/v1/model", timeout=10) as reply:
        told = json.load(reply)
    server.halt()
    return {f"{entry['width']:g}": entry["latency_ms"] for entry in told["widths"]}


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser, cpus = _parser(), sorted(available_cpus())
    options = parser.parse_args(given)
    if shutil.which("wrk") is None:
        parser.error("wrk is not installed, and the load comes from it: apt-get install wrk")
    if options.rounds < 1 or not 1 <= options.seconds <= 600:
        parser.error("give at least one round, of 1 to 600 seconds")
    cores = options.cores or sorted({1, len(cpus)})
    if len({*cores}) < len(cores) or not all(1 <= each <= len(cpus) for each in cores):
        parser.error(f"--cores are different numbers from 1 to {len(cpus)}")
    try:
        config, _ = read_card(options.checkpoint)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        os.environ |= {"SCALA_CHECKPOINT": str(options.checkpoint), "SCALA_PROFILE_DIR": folder}
        servers = {each: _halted(stack, cpus[:each]) for each in cores}
        stack.enter_context(pinned(cpus[-1:]))  # wrk takes after this process
        bench = Bench(servers, Path(folder))
        measured = bench.measure([str(width) for width in config.widths], options.rounds, options.seconds)
    title = "What one replica serves"
    show(title, table(measured.rows), measured.sentences())
    try:
        if options.markdown:
            setting = setting_of("benchmarks.capacity", given, PACKAGES, config, options.checkpoint)
            facts = [
                f"Load: wrk on the last core, {CALLERS} callers in closed loop, one JPEG of 64 px "
                f"({len(noise()):,} bytes). {options.rounds} rounds of {options.seconds} s, medians of them.",
            ]
            text = dated_file(f"{title}, {cpu_name()}", setting, facts, table(measured.rows), measured.sentences())
            options.markdown.write_text(text, encoding="utf-8")
    finally:
        print(json.dumps(measured.as_json()))


def _halted(stack: ExitStack, cpus: Sequence[int]) -> Running:
    """A warm server on these cores. Raises ValueError or TimeoutError where none comes up."""
    say(f"starting a server on {len(cpus)} cores")
    warm = stack.enter_context(serving("adaptive", cpus))
    running = Running(warm.pid, warm.port, "/v1/classify")
    running.halt()
    return running


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, default=default_checkpoint(), metavar="DIR", help="default: the package's own"
    )
    parser.add_argument("--cores", type=int, nargs="+", metavar="N", help="default: 1, and all that there are")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=int, default=4, metavar="S", help="of a turn; default: %(default)s")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="write a dated file of results")
    return parser


if __name__ == "__main__":
    main()
