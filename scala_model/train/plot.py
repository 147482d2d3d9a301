"""Accuracy against cost, as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

MARKERS = "osD^vPX*"  # told apart without colour, too


@dataclass(frozen=True)
class Point:
    """One width of one method: multiply-adds of an image, top-1 accuracy and its 95 % interval as fractions."""

    macs: int
    accuracy: float
    interval: tuple[float, float]


def plot_accuracy(path: str | os.PathLike[str], curves: Mapping[str, Sequence[Point]]) -> None:
    """Write a PNG of accuracy against multiply-adds, one line a method: the same curves, the same bytes.

    Raises ValueError when there is no curve, or one without points.
    """
    # Without pyplot, which keeps figures in a global list; "Software" would tell the version of what drew it.
    accuracy_figure(curves).savefig(path, format="png", backend="agg", metadata={"Software": None})


def accuracy_figure(curves: Mapping[str, Sequence[Point]]) -> Figure:
    """The figure that ``plot_accuracy`` writes."""
    if not curves or not all(curves.values()):
        raise ValueError("there is nothing to plot: give at least one method, and at least one point for each")
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for i, (method, points) in enumerate(curves.items()):
        ordered = sorted(points, key=lambda point: point.macs)
        below = [100 * (point.accuracy - point.interval[0]) for point in ordered]
        above = [100 * (point.interval[1] - point.accuracy) for point in ordered]
        axes.errorbar(
            [point.macs for point in ordered],
            [100 * point.accuracy for point in ordered],
            yerr=[below, above],
            label=method,
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            capsize=3,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("multiply-adds per image (logarithmic)")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="bars: 95 % intervals", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
