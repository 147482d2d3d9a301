"""What the benchmark of servers found: its rows, the table for people, the dated file and the line of JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.dated_file import Setting, dated_file
from benchmarks.peer_load import Turn
from scala_model.width import Width

OURS, BARE, LIT = "scala-serve", "FastAPI", "LitServe"


@dataclass(frozen=True, slots=True)
class Row:
    """A server at one width, its turns in the order of the rounds; none of one that is not installed.

    ``tried``: requests/s of the settings that were tried beforehand, of which ``settings`` are the best.
    """

    width: Width
    name: str
    version: str
    settings: str
    tried: Mapping[str, float]
    turns: Sequence[Turn]

    @property
    def rate(self) -> float:
        """Median requests/s of the rounds."""
        return statistics.median(turn.rate for turn in self.turns)

    @property
    def cpu_ms(self) -> float:
        return statistics.median(turn.cpu_ms for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Overhead:
    """Milliseconds of our answers that were not the engine's, of each round."""

    p50_ms: Sequence[float]
    p99_ms: Sequence[float]


@dataclass(frozen=True, slots=True)
class Report:
    engine: str
    device: str
    overhead: Overhead
    rows: Sequence[Row]

    def row(self, width: Width, name: str) -> Row:
        return next(row for row in self.rows if (row.width, row.name) == (width, name))

    @property
    def widths(self) -> list[Width]:
        return list(dict.fromkeys(row.width for row in self.rows))


def ratio(ours: Row, theirs: Row) -> float | None:
    """Our requests/s over theirs, the median of the rounds' ratios; None where theirs was not measured."""
    if not theirs.turns:
        return None
    return statistics.median(one.rate / other.rate for one, other in zip(ours.turns, theirs.turns, strict=True))


def as_json(report: Report) -> dict[str, Any]:
    """The report as data. ``ratio_*`` are those at the narrowest width."""
    narrowest = report.widths[0]
    ours = report.row(narrowest, OURS)
    return {
        "overhead_p50_ms": round(statistics.median(report.overhead.p50_ms), 3),
        "overhead_p99_ms": round(statistics.median(report.overhead.p99_ms), 3),
        "ratio_fastapi": _rounded(ratio(ours, report.row(narrowest, BARE))),
        "ratio_litserve": _rounded(ratio(ours, report.row(narrowest, LIT))),
        "engine": report.engine,
        "device": report.device,
        "overhead_rounds": {
            "p50_ms": [round(value, 3) for value in report.overhead.p50_ms],
            "p99_ms": [round(value, 3) for value in report.overhead.p99_ms],
        },
        "rows": [_row_as_json(row, report.row(row.width, OURS)) for row in report.rows],
    }


def _row_as_json(row: Row, ours: Row) -> dict[str, Any]:
    told: dict[str, Any] = {"width": float(row.width), "server": row.name, "version": row.version}
    if not row.turns:
        return told
    return told | {
        "settings": row.settings,
        "rate": round(row.rate, 1),
        "rates": [round(turn.rate, 1) for turn in row.turns],
        "ratio": _rounded(ratio(ours, row)),
        "cpu_ms_per_request": round(row.cpu_ms, 2),
        "p50_ms": round(statistics.median(turn.p50_ms for turn in row.turns), 1),
        "p99_ms": round(statistics.median(turn.p99_ms for turn in row.turns), 1),
        "failed": sum(turn.failed for turn in row.turns),
        "tried": {settings: round(rate, 1) for settings, rate in row.tried.items()},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def table(report: Report) -> list[list[str]]:
    """A heading and a line for each server at each width."""
    heading = [
        "width",
        "server",
        "settings",
        "requests/s",
        "least–most",
        "ours / its",
        "CPU ms",
        "p50 / p99 ms",
        "failed",
    ]
    return [heading, *(_cells(row, report.row(row.width, OURS)) for row in report.rows)]


def _cells(row: Row, ours: Row) -> list[str]:
    if not row.turns:
        return [str(row.width), row.name, row.version, *["–"] * 6]
    told, rates = _row_as_json(row, ours), [turn.rate for turn in row.turns]
    return [
        str(row.width),
        f"{row.name} {row.version}".strip(),
        row.settings,
        f"{row.rate:.0f}",
        f"{min(rates):.0f}–{max(rates):.0f}",
        f"{told['ratio']:.2f}",
        f"{row.cpu_ms:.2f}",
        f"{told['p50_ms']:.0f} / {told['p99_ms']:.0f}",
        str(told["failed"]),
    ]


def summary(report: Report) -> list[str]:
    """What the table does not hold, a sentence each."""
    overhead = report.overhead
    least, most = min(overhead.p99_ms), max(overhead.p99_ms)
    sentences = [
        f"HTTP overhead, one caller, an engine that takes no time: p50 {statistics.median(overhead.p50_ms):.2f} ms, "
        f"p99 {statistics.median(overhead.p99_ms):.2f} ms ({least:.2f} to {most:.2f} in {len(overhead.p99_ms)} rounds)."
    ]
    for row in report.rows:
        if len(row.tried) > 1:
            tried = ", ".join(f"{settings}: {rate:.0f}/s" for settings, rate in row.tried.items())
            sentences.append(f"{row.name} at width {row.width}, tried for its best settings: {tried}.")
    return sentences


def markdown(report: Report, setting: Setting, rounds: int, seconds: int) -> str:
    """A dated file of results."""
    return dated_file(
        f"The server beside others, {report.device}",
        setting,
        [
            f"Engine: {report.engine}, the same object in all servers, and the same decoder.",
            f"Load: wrk, 16 callers in closed loop, one JPEG of 64 px, on the servers' cores. {rounds} rounds of "
            f"{seconds} s; the servers take turns, every other round backwards, and are halted while others have "
            "theirs. Figures are medians of the rounds, ratios those of each round.",
            "CPU: milliseconds of all of a server's processes for each request, wrk's left out.",
            "Not measured: other images, more callers, open loop, several HTTP processes before one engine, other "
            "machines.",
        ],
        table(report),
        summary(report),
    )
