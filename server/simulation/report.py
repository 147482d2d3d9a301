"""What the simulations found: a table for people, sentences, plots and JSON. Accuracies and shares in percent there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from server.simulation.campaign import FIXED, Comparison
from server.simulation.experiment import OURS, STATIC, Interval, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What a family is called, and how the names of its policies begin. The best of a family stands for it.
FAMILIES = {
    "best fixed": FIXED,
    "SlackFit": ("SF-", "slackfit"),
    "greedy": ("MA", "MB"),
    "TH": ("TH", "threshold"),
    "MS": ("MS",),
    "static": (STATIC,),
}
HEADING = [
    "workload",
    "ours",
    *FAMILIES,
    "bound",
    "vs fixed",
    "vs SlackFit",
    "in time",
    "admitted",
    "widest",
]


def table(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """A heading and a line for each scenario; effective accuracy and shares in percent, differences in points.

    ``in time`` is of all arrivals, ``admitted`` of those not refused; ``widest``: answered at the widest width.
    """
    empty = {name for name in FAMILIES if not any(one.best(*FAMILIES[name]) for one in comparisons)}
    lines = [HEADING, *map(_cells, comparisons)]
    return [[cell for title, cell in zip(HEADING, line, strict=True) if title not in empty] for line in lines]


def _cells(one: Comparison) -> list[str]:
    budgets = "" if one.scenario.group != "budgets" else f" ({one.scenario.budgets} ms)"
    return [
        one.scenario.label + budgets,
        _percent(one.mean(OURS)),
        *(_best_cell(one, name) for name in FAMILIES),
        _percent(one.bound),
        _difference_cell(one, "best fixed"),
        _difference_cell(one, "SlackFit"),
        _percent(one.mean(OURS, "attainment")),
        _percent(one.mean(OURS, "attainment_admitted")),
        _percent(one.mean(OURS, "widest")),
    ]


def _best_cell(one: Comparison, family: str) -> str:
    best = one.best(*FAMILIES[family])
    return "" if best is None else f"{_percent(one.mean(best))} {best}"


def _difference_cell(one: Comparison, family: str) -> str:
    best = one.best(*FAMILIES[family])
    return "" if best is None else _points(one.ahead_of(best))


def summary(comparisons: Sequence[Comparison]) -> list[str]:
    """What the table says on the whole, a sentence each."""
    found = [_ahead_sentence(comparisons, group, "best fixed") for group in ("stationary", "changing")]
    found.append(_ahead_sentence(comparisons, None, "SlackFit"))
    calm = [one for one in comparisons if one.scenario.name in ("poisson", "gamma 2") and one.scenario.load <= 1]
    if calm:
        least = min(one.mean(OURS) / one.bound for one in calm)
        found.append(f"Of the bound, Poisson and gamma 2 up to 1x: at least {_percent(least)} %.")
    apart = max(abs(one.mean(OURS) - one.mean(OURS, "effective_accuracy")) for one in comparisons)
    found.append(
        "Effective accuracies are averages over all images; by the images that were drawn for the requests, ours "
        f"differ by {100 * apart:.2f} points at most."
    )
    return [sentence for sentence in found if sentence]


def _ahead_sentence(comparisons: Sequence[Comparison], group: str | None, family: str) -> str:
    """Empty where there is nothing to compare."""
    ahead = {
        one.scenario.label: one.ahead_of(best).mean
        for one in comparisons
        if group in (None, one.scenario.group) and (best := one.best(*FAMILIES[family]))
    }
    if not ahead:
        return ""
    least = min(ahead, key=lambda label: ahead[label])
    return (
        f"Ahead of {family} ({group or 'all'}): {100 * fmean(ahead.values()):+.2f} points on average, "
        f"{100 * ahead[least]:+.2f} at least ({least})."
    )


def as_json(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The table as data: accuracies and shares 0..1."""
    machine = comparisons[0].machine
    return {
        "about": machine.about,
        "capacity": round(machine.capacity, 2),
        "seeds": len(comparisons[0].bounds),
        "workloads": [_as_json(one) for one in comparisons],
    }


def _as_json(one: Comparison) -> dict[str, Any]:
    best = {family: name for family, prefixes in FAMILIES.items() if (name := one.best(*prefixes))}
    return {
        **{name: value for name, value in asdict(one.scenario).items() if value is not None},
        "bound": round(one.bound, 5),
        "best": best,
        "ahead": {family: _rounded(one.ahead_of(name)) for family, name in best.items()},
        "policies": {name: _measures(one, name) for name in [OURS, *best.values()]},
    }


def _rounded(interval: Interval) -> list[float]:
    return [round(value, 5) for value in (interval.mean, interval.low, interval.high)]


def _measures(one: Comparison, policy: str) -> dict[str, float]:
    """Means over the seeds."""
    return {field.name: round(one.mean(policy, field.name), 5) for field in fields(Result)}


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _points(interval: Interval) -> str:
    return f"{100 * interval.mean:+.2f} ± {100 * (interval.high - interval.mean):.2f}"


# -- plots


def draw(folder: Path, comparisons: Sequence[Comparison]) -> list[Path]:
    """Write the machine's plots, PNG; their paths. Needs matplotlib."""
    name = comparisons[0].machine.name
    figures = {f"{name}-ahead.png": ahead_figure(comparisons)}
    if any(len(curve) > 1 for curve in _by_name(comparisons).values()):
        figures[f"{name}-accuracy.png"] = accuracy_figure(comparisons)
    for file, figure in figures.items():
        figure.savefig(folder / file, format="png", backend="agg", metadata={"Software": None})
    return [folder / file for file in figures]


def accuracy_figure(comparisons: Sequence[Comparison]) -> Figure:
    """Effective accuracy against load, a panel for each kind of traffic of which there are several loads."""
    from matplotlib.figure import Figure

    panels = {name: curve for name, curve in _by_name(comparisons).items() if len(curve) > 1}
    figure = Figure(figsize=(4 * len(panels) + 1.5, 4), dpi=150, layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (name, curve) in zip(all_axes, panels.items(), strict=True):
        _draw_panel(axes, sorted(curve, key=lambda one: one.scenario.load))
        axes.set_title(name, fontsize="medium")
    all_axes[0].set_ylabel("effective accuracy (%)")
    all_axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_panel(axes: Axes, curve: Sequence[Comparison]) -> None:
    from scala_model.train.plot import MARKERS

    loads = [one.scenario.load for one in curve]
    axes.plot(loads, [100 * one.bound for one in curve], "k--", label="bound")
    lines = {OURS: [one.mean(OURS) for one in curve]}
    for family, prefixes in FAMILIES.items():
        bests = [best for one in curve if (best := one.best(*prefixes))]
        if len(bests) == len(curve):
            lines[family] = [one.mean(best) for one, best in zip(curve, bests, strict=True)]
    for (name, values), marker in zip(lines.items(), MARKERS, strict=False):
        axes.plot(loads, [100 * value for value in values], marker=marker, markersize=5, label=name)
    axes.set_xscale("log")
    axes.set_xticks(loads, [f"{load:g}" for load in loads])
    axes.minorticks_off()
    axes.set_xlabel("load (capacities of the widest)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def ahead_figure(comparisons: Sequence[Comparison]) -> Figure:
    """By how many points ours is ahead of the best fixed width and of SlackFit, with 95 % intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.3 * len(comparisons)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for shift, family in ((-0.12, "best fixed"), (0.12, "SlackFit")):
        found = [
            (row + shift, one.ahead_of(best))
            for row, one in enumerate(comparisons)
            if (best := one.best(*FAMILIES[family]))
        ]
        axes.errorbar(
            [100 * interval.mean for _, interval in found],
            [row for row, _ in found],
            xerr=[100 * (interval.high - interval.mean) for _, interval in found],
            fmt="o" if family == "best fixed" else "s",
            markersize=4,
            capsize=2,
            label=family,
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(comparisons)), [one.scenario.label for one in comparisons])
    axes.invert_yaxis()
    axes.set_xlabel("ours less the other (points of effective accuracy; bars: 95 % intervals)")
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _by_name(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    curves: dict[str, list[Comparison]] = {}
    for one in comparisons:
        curves.setdefault(one.scenario.name, []).append(one)
    return curves
