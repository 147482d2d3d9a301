"""A run over time, as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from server.bench.records import Records

NUM_BINS = 60


def plot_run(path: Path, records: Records, title: str) -> None:
    """Write a PNG: the same run, the same bytes."""
    run_figure(records, title).savefig(path, format="png", backend="agg", metadata={"Software": None})


def run_figure(records: Records, title: str) -> Figure:
    """The figure that ``plot_run`` writes: four panels over the time of arrival, in 60 parts of the run."""
    figure = Figure(figsize=(8, 9), dpi=150, layout="constrained")
    mix, latency, attainment, accuracy = figure.subplots(4, 1, sharex=True)
    workload = records.workload
    edges = np.linspace(0, max(workload.seconds, 1e-3), NUM_BINS + 1)
    bins = np.minimum(np.searchsorted(edges, workload.arrivals_s, "right") - 1, NUM_BINS - 1)
    _draw_mix(mix, records, bins, edges)
    _draw_latency(latency, records, bins, edges)
    for axes, name, hit in (
        (attainment, "answered in\nbudget (%)", records.in_time),
        (accuracy, "correct and in\nbudget (%)", records.effective),
    ):
        _draw_share(axes, hit, bins, edges)
        axes.set_ylabel(name)
    for axes in (mix, latency, attainment, accuracy):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    mix.set_title(title, fontsize="medium")
    accuracy.set_xlabel("time of arrival (s)")
    return figure


def _draw_mix(axes: Axes, records: Records, bins: NDArray[np.int64], edges: NDArray[np.float64]) -> None:
    """Requests a second, stacked by the width that answered; those without an answer on top."""
    widths = np.unique(records.width[records.answered]).tolist()
    kinds = {f"{width:g}": records.width == width for width in widths} | {"none": ~records.answered}
    rates = [np.bincount(bins[chosen], minlength=NUM_BINS) / (edges[1] - edges[0]) for chosen in kinds.values()]
    shades = [(0.2, 0.35 + 0.5 * i / max(1, len(widths) - 1), 0.75) for i in range(len(widths))]
    axes.stackplot(edges[:-1], rates, labels=list(kinds), step="post", colors=[*shades, "0.75"])
    axes.set_ylabel("requests/s\nby width")
    axes.legend(title="width", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _draw_latency(axes: Axes, records: Records, bins: NDArray[np.int64], edges: NDArray[np.float64]) -> None:
    """Latency as a share of its budget: median and p99 of each part of the run."""
    share = 100 * records.latency_s / records.workload.budgets_s
    for q, style in ((50, "-"), (99, ":")):
        values = [_percentile(share[records.answered & (bins == i)], q) for i in range(NUM_BINS)]
        axes.step(edges[:-1], values, style, where="post", label=f"p{q}", color="C0")
    axes.axhline(100, color="C3", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("latency\n(% of budget)")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _draw_share(axes: Axes, hit: NDArray[np.bool_], bins: NDArray[np.int64], edges: NDArray[np.float64]) -> None:
    arrived, hits = np.bincount(bins, minlength=NUM_BINS), np.bincount(bins[hit], minlength=NUM_BINS)
    share = np.where(arrived > 0, 100 * hits / np.maximum(arrived, 1), np.nan)
    axes.step(edges[:-1], share, where="post", color="C0")
    axes.axhline(100 * float(hit.mean()), color="0.5", linewidth=1, linestyle="--", label="mean")
    axes.set_ylim(0, 102)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _percentile(values: NDArray[np.float64], q: int) -> float:
    return float(np.percentile(values, q)) if values.size else float("nan")
