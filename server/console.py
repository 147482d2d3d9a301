"""What commands show to people: tables on standard output, progress on standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from scala_model.correctness import dominated_widths
from scala_model.width import Width
from server.latency_profile import LatencyProfile

if TYPE_CHECKING:
    from server.profiling import Report


def print_accuracy(card: Mapping[str, Any]) -> None:
    """A table of what was evaluated; the line of JSON is the caller's."""
    table = Table("width", "top-1 %", "95 % interval", "top-5 %", "ECE", "parameters", "MACs")
    for entry in card["widths"]:
        low, high = entry["accuracy_ci95"]
        table.add_row(
            f"{entry['width']:g}",
            f"{100 * entry['accuracy']:.2f}",
            f"{100 * low:.2f} to {100 * high:.2f}",
            f"{100 * entry['accuracy_top5']:.2f}",
            f"{entry['calibration_error']:.3f}",
            f"{entry['parameters'] / 1e6:.2f} M",
            f"{entry['macs'] / 1e6:.1f} M",
        )
    Console().print(table)
    if dominated := _dominated(card):
        print(f"Dominated, no more accurate than a narrower width: {', '.join(map(str, dominated))}")


def accuracy_as_json(folder: Path, card: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "checkpoint": str(folder),
        "images": card["evaluation"]["images"],
        "widths": card["widths"],
        "dominated": [float(width) for width in _dominated(card)],
    }


def _dominated(card: Mapping[str, Any]) -> Sequence[Width]:
    return dominated_widths({Width(entry["width"]): entry["accuracy"] for entry in card["widths"]})


def print_latency(report: Report) -> None:
    """A table of what was measured; the line of JSON is the caller's."""
    profile = report.profile
    largest = max(batch for _, batch in report.runs)
    buckets = [batch for batch in profile.buckets if batch <= largest]
    table = Table("width", *(f"batch {batch}" for batch in buckets), "images/s (batch)", title="p50 / p99 ms")
    for width in filter(profile.ready, profile.widths):
        cells = [_latency_ms(profile, width, batch) if (width, batch) in report.runs else "" for batch in buckets]
        best = profile.best_batch(width)
        table.add_row(str(width), *cells, f"{1 / profile.seconds_per_image(width):.0f} ({best})")
    Console().print(table)
    if any(map(profile.dominated_at, buckets)):
        print("* dominated: at this batch size another width is as accurate and no slower")
    if report.memory_bytes > 0:
        print(f"device memory: {report.memory_bytes / 2**20:.0f} MiB")


def _latency_ms(profile: LatencyProfile, width: Width, batch: int) -> str:
    mark = " *" if width in profile.dominated_at(batch) else ""
    return f"{1000 * profile.p50(width, batch):.2f} / {1000 * profile.p99(width, batch):.2f}{mark}"


def progress(show: bool) -> Progress:
    """A progress bar on standard error, or none."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=Console(stderr=True), disable=not show)
