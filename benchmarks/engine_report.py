"""What the engine benchmark found: its numbers, the table for people, the dated file and the line of JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.dated_file import Setting, dated_file
from benchmarks.engine_server import Served
from scala_model.cost import Cost
from scala_model.width import Width

FLOPS_PER_MAC = 2


@dataclass(frozen=True)
class Row:
    """Medians of one width and batch size; ``macs`` are those of one image."""

    width: Width
    batch: int
    macs: int
    ours_ms: float
    rivals_ms: Mapping[str, float]

    @property
    def best_rival(self) -> str:
        return min(self.rivals_ms, key=lambda name: self.rivals_ms[name])

    @property
    def ratio(self) -> float:
        """Our time over the best rival's: below 1, ours is faster."""
        return self.ours_ms / self.rivals_ms[self.best_rival]

    def ceiling_fraction(self, ceiling_flops: float) -> float:
        """The network's arithmetic a second, as a share of the matrix product's ``ceiling_flops`` (FLOP/s)."""
        return FLOPS_PER_MAC * self.macs * self.batch / (self.ours_ms / 1000) / ceiling_flops


@dataclass(frozen=True)
class Report:
    """All that was measured. ``ceiling_flops`` is the rate of a large matrix product in ``precision``."""

    device: str
    engine: str
    threads: int
    precision: str
    rows: Sequence[Row]
    ceiling_flops: float
    switch_ms: float
    served: Served

    @property
    def geometric_mean_ratio(self) -> float:
        return statistics.geometric_mean(row.ratio for row in self.rows)

    @property
    def rivals(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row.rivals_ms))


def as_json(report: Report, versions: Mapping[str, str]) -> dict[str, Any]:
    """The report as data, rounded to what was measured."""
    return {
        "device": report.device,
        "engine": report.engine,
        "threads": report.threads,
        "precision": report.precision,
        "versions": dict(versions),
        "rows": [_row_as_json(row, report.ceiling_flops) for row in report.rows],
        "geometric_mean_ratio": round(report.geometric_mean_ratio, 4),
        "ceiling_tflops": round(report.ceiling_flops / 1e12, 4),
        "switch_ms": round(report.switch_ms, 4),
        "rss_mib": round(report.served.rss_mib, 1),
        "rss_batches_mib": round(report.served.rss_batches_mib, 1),
        "ready_s": round(report.served.ready_s, 2),
        "all_widths_s": round(report.served.all_widths_s, 2),
    }


def _row_as_json(row: Row, ceiling_flops: float) -> dict[str, Any]:
    return {
        "width": float(row.width),
        "batch": row.batch,
        "ours_ms": round(row.ours_ms, 4),
        "best_rival": row.best_rival,
        "best_rival_ms": round(row.rivals_ms[row.best_rival], 4),
        "ratio": round(row.ratio, 4),
        "ceiling_fraction": round(row.ceiling_fraction(ceiling_flops), 4),
        "rivals_ms": {name: round(value, 4) for name, value in row.rivals_ms.items()},
    }


def table(report: Report) -> list[list[str]]:
    """A heading and a line for each width and batch; times in ms, a dash where a rival was not measured."""
    heading = ["width", "batch", "ours", *report.rivals, "ours / best", "of the ceiling"]
    return [heading, *(_cells(row, report) for row in report.rows)]


def _cells(row: Row, report: Report) -> list[str]:
    times = (row.rivals_ms.get(name) for name in report.rivals)
    return [
        str(row.width),
        str(row.batch),
        f"{row.ours_ms:.2f}",
        *("–" if value is None else f"{value:.2f}" for value in times),
        f"{row.ratio:.2f}",
        f"{row.ceiling_fraction(report.ceiling_flops):.0%}",
    ]


def summary(report: Report) -> list[str]:
    """What the table does not hold, a sentence each."""
    served = report.served
    return [
        f"Geometric mean of ours / best rival: {report.geometric_mean_ratio:.3f} over {len(report.rows)} cells; best "
        f"is the fastest rival of the cell.",
        f"Ceiling: a matrix product in {report.precision} reaches {report.ceiling_flops / 1e12:.3g} TFLOP/s.",
        "The share of it counts the whole network, of which ours leaves out what no head reads: 7 % of twelve blocks.",
        f"One image takes {report.switch_ms:.3f} ms longer after another width than after its own, in the mean.",
        f"The server is ready {served.ready_s:.1f} s after its start, at every width after "
        f"{served.all_widths_s:.1f} s, and holds {served.rss_mib:.0f} MiB once every width has answered.",
        f"It holds {served.rss_batches_mib:.0f} MiB once every width has run every batch size.",
    ]


def markdown(report: Report, setting: Setting, minutes: float) -> str:
    """A dated file of results."""
    return dated_file(
        f"The engine beside other runtimes, {report.device}",
        setting,
        [
            f"Engine: {report.engine}. All engines: {_counted(report.threads, 'CPU thread')}, uint8 pixels to "
            "probabilities; rivals run each width as a dense network of its own.",
            f"Times are medians in ms over {minutes:g} minutes for all cells together; the engines of a cell take "
            "turns, each turn after one run that is not counted.",
            "A dash: not measured, because compiling a network for each width and batch takes longer than the rest.",
            "Not measured: other image sizes and depths, other numbers of threads, other machines, INT8, memory of the "
            "rivals, latency beside other load.",
        ],
        table(report),
        summary(report),
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def row_of(width: Width, batch: int, cost: Cost, medians_s: Mapping[str, float], ours: str) -> Row:
    """A row from the median seconds of all, of which ``ours`` is one."""
    times_ms = {name: 1000 * value for name, value in medians_s.items()}
    return Row(width, batch, cost.macs, times_ms.pop(ours), times_ms)
