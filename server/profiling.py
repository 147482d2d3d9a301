"""Measure every width at every batch size: for people, and for the next server that starts on this machine.

All cells are measured in turns, over and over, not one after the other: a machine that gets slower meanwhile, warm or
busy with something else, then does so to all of them alike, and the widths stay comparable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scala_model.checkpoint import default_checkpoint, read_checkpoint
from scala_model.width import Width
from server.cgroup import available_cpus
from server.engine import engine_of
from server.engine.contract import DeviceOutOfMemory, Engine
from server.latency_profile import LatencyProfile, buckets_up_to
from server.profile_store import Key, Table
from server.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUNDS = 30  # and at least as many runs of every cell
Progress = Callable[[int, int], object]  # done, of how many


@dataclass(frozen=True)
class Report:
    """What was measured of one engine. ``runs`` of each (width, batch); ``memory_bytes`` of the device."""

    checkpoint: Path
    table: Table
    profile: LatencyProfile
    runs: Mapping[tuple[Width, int], int]
    memory_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Cells by width and batch; ``dominated``: another width is as accurate and no slower at that batch size."""
        return {
            "device": self.table.key.device,
            "engine": self.table.key.engine,
            "checkpoint": str(self.checkpoint),
            "threads": self.table.key.threads,
            "cells": [
                {
                    "width": float(width),
                    "batch": batch,
                    "p50_ms": round(1000 * self.profile.p50(width, batch), 4),
                    "p99_ms": round(1000 * self.profile.p99(width, batch), 4),
                    "runs": self.runs[width, batch],
                    "dominated": width in self.profile.dominated_at(batch),
                }
                for width, batch in sorted(self.runs)
            ],
            "memory_bytes": self.memory_bytes,
        }


def measure(settings: Settings, seconds: float, progress: Progress) -> Report:
    """Load the engine as the server would, and measure each cell in ``ROUNDS`` runs or more, ``seconds`` at least.

    Raises CheckpointError, SettingsError, and ValueError where the device cannot run a single image.
    """
    folder = settings.checkpoint or default_checkpoint()
    checkpoint = read_checkpoint(folder)
    engine = engine_of(settings, checkpoint, available_cpus())
    try:
        samples_s = sample(engine, checkpoint.config.widths, checkpoint.config.image_size, seconds, progress)
        memory_bytes = engine.memory_bytes()
    finally:
        engine.close()
    table = Table.of(Key.of(engine, checkpoint.card["weights_sha256"]), samples_s)
    accuracies = {checkpoint.config.width(entry["width"]): entry["accuracy"] for entry in checkpoint.card["widths"]}
    profile = LatencyProfile(accuracies, engine.max_batch)
    for width, batch in samples_s:
        profile.record(width, batch, table.scaled_samples_s(width, batch, 1.0))
    return Report(folder, table, profile, {cell: len(runs) for cell, runs in samples_s.items()}, memory_bytes)


def sample(
    engine: Engine, widths: Sequence[Width], image_size: int, seconds: float, progress: Progress
) -> dict[tuple[Width, int], list[float]]:
    """Seconds of every run of each (width, batch). What the device has no memory for is left out.

    Raises ValueError where that is everything.
    """
    loaded = [width for width in widths if _loads(engine, width)]
    samples: dict[tuple[Width, int], list[float]] = {
        (width, batch): [] for batch in buckets_up_to(engine.max_batch) for width in loaded
    }
    # Noise, as a GPU draws less power and may clock higher on zeros.
    pixels = np.random.default_rng(0).integers(0, 256, (engine.max_batch, image_size, image_size, 3), np.uint8)
    done, total = 0, (ROUNDS + 1) * len(samples)
    for turn in range(ROUNDS + 1):
        for width, batch in list(samples):
            progress(done := done + 1, total)
            if (width, batch) not in samples:  # a smaller one has just failed
                continue
            try:
                other = next((other for other in loaded if other != width), width)
                seen = _runs(engine, pixels[:batch], width, other, seconds / ROUNDS if turn else 0.0)
            except DeviceOutOfMemory:
                samples = {cell: s for cell, s in samples.items() if cell[0] != width or cell[1] < batch}
            else:
                samples[width, batch] += seen if turn else []  # the first run may compile or allocate
    if not samples:
        raise ValueError("the device has no memory for one image at any width: free some, or use --device cpu")
    return samples


def _loads(engine: Engine, width: Width) -> bool:
    try:
        engine.load(width, engine.max_batch)
    except DeviceOutOfMemory:
        return False
    return True


def _runs(engine: Engine, pixels: NDArray[np.uint8], width: Width, other: Width, seconds: float) -> list[float]:
    """How long each run took of one run or more, for ``seconds`` in all, with an image at the ``other`` width between
    them: the same batch over and over is up to a third faster than it is among others."""
    runs: list[float] = []
    while not runs or sum(runs) < seconds:
        if runs:
            engine.run(pixels[:1], other)
        started = time.monotonic()
        engine.run(pixels, width)
        runs.append(time.monotonic() - started)
    return runs


def plot_latency(path: Path, report: Report) -> None:
    """Write a PNG of latency against batch size, one line a width. Needs matplotlib."""
    latency_figure(report).savefig(path, format="png", backend="agg", metadata={"Software": None})


def latency_figure(report: Report) -> Figure:
    """The figure that ``plot_latency`` writes: medians, with a bar up to p99; both axes logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from scala_model.train.plot import MARKERS

    profile, key = report.profile, report.table.key
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for i, width in enumerate(filter(profile.ready, profile.widths)):
        cells = [
            (batch, 1000 * profile.p50(width, batch), 1000 * profile.p99(width, batch))
            for batch in profile.warmed(width)
        ]
        axes.errorbar(
            [batch for batch, _, _ in cells],
            [p50_ms for _, p50_ms, _ in cells],
            yerr=[[0.0] * len(cells), [p99_ms - p50_ms for _, p50_ms, p99_ms in cells]],
            label=str(width),
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            capsize=3,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(profile.buckets, [str(batch) for batch in profile.buckets])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.set_xlabel("images in a batch (logarithmic)")
    axes.set_ylabel("latency (ms, logarithmic)")
    axes.set_title(f"{key.device}, {key.engine}, {key.threads} CPU thread{'s' * (key.threads != 1)}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="width; bars: to p99", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
