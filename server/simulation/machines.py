"""Machines to simulate: two that are built in, so that nothing has to be measured first, and those that were measured.

What of the built-in ones is measured and what assumed stands beside their figures, and in ``Machine.about``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scala_model.checkpoint import read_card
from scala_model.config import variant
from scala_model.correctness import REMEDY, read_correctness
from scala_model.cost import cost_of
from scala_model.width import Width
from server.latency_profile import MIN_SAMPLES, SAMPLES, buckets_up_to
from server.simulation.device import Cells, Machine
from server.simulation.simulator import Frontend

# -- which images are right


def drawn_correctness(accuracy: Sequence[float], num_images: int = 10_000, seed: int = 0) -> NDArray[np.bool_]:
    """A matrix (N, X) whose columns have exactly these means, up to one image.

    Each image has a difficulty, and at each width some luck: the easiest are right (a probit model, normal difficulty
    plus ``LUCK`` times normal luck). Hence widths mostly get the same images right, and some images are right at a
    narrow width and wrong at a wide one.
    """
    rng = np.random.default_rng(seed)
    hardness = rng.normal(size=(num_images, 1)) + LUCK * rng.normal(size=(num_images, len(accuracy)))
    rank = hardness.argsort(axis=0).argsort(axis=0)
    correct: NDArray[np.bool_] = rank < np.round(np.array(accuracy) * num_images)
    return correct


LEVELS = (np.arange(SAMPLES) + 0.5) / SAMPLES

# Drawn at the embedded checkpoint's accuracies, 5.0 % of the images are right at 0.25 and wrong at 1; really 4.8 % are.
LUCK = 0.5

# Scala-S, X = 7, on ImageNet (Zhang et al. 2024): its four published widths. Those between are read off straight lines
# from one to the next.
PUBLISHED = {0.25: 0.598, 0.5: 0.703, 0.75: 0.742, 1.0: 0.765}
WIDTHS = tuple(Width(ratio) for ratio in (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0))
ACCURACY = tuple(float(np.interp(float(width), list(PUBLISHED), list(PUBLISHED.values()))) for width in WIDTHS)

# Medians in ms of 1, 4 and 16 images: benchmarks/results/2026-11-22-engine-cpu.md. Two and eight lie on the lines.
CPU_MS = {
    0.25: (1.66, 5.23, 18.98),
    0.375: (3.70, 11.27, 28.97),
    0.5: (3.57, 11.25, 37.47),
    0.625: (6.07, 18.27, 68.60),
    0.75: (7.87, 24.52, 85.07),
    0.875: (9.34, 30.85, 103.64),
    1.0: (11.06, 34.23, 119.12),
}
# The spread of single runs on such a machine: an upper quartile 3 to 4 % and a p99 15 to 20 % above the median.
CPU_SIGMA = 0.06
# A small GPU that is launched kernel by kernel: every batch takes GPU_LAUNCH_MS, plus GPU_IMAGE_MS an image at full
# width and less in proportion to the multiply-adds at the others. Nothing of this is measured.
GPU_LAUNCH_MS, GPU_IMAGE_MS, GPU_MAX_BATCH, GPU_SIGMA = 6.0, 0.4, 64, 0.03
GPU_MAX_IMAGES = 1024  # 256 would be 32 ms of work: the bound, not the deadlines, would then say who is served


def built_in(name: str) -> Machine:
    """``cpu`` or ``gpu``. Raises ValueError for another name."""
    correct = drawn_correctness(ACCURACY)
    images = (
        "Accuracies: Scala-S on ImageNet as published, widths 0.375, 0.625 and 0.875 interpolated; which images are "
        "right is drawn."
    )
    if name == "cpu":
        about = "Latencies: DeiT-S at 64 px, measured on 2 cores; 2 and 8 images interpolated."
        front = Frontend(decoders=1, decode_s=0.0003, hop_s=0.0002, respond_s=0.0003)
        return Machine("cpu", f"{about} {images}", WIDTHS, _cpu_cells(), correct, front)
    if name == "gpu":
        about = "Latencies: an assumed GPU, on which batches are nearly free; not measured."
        front = Frontend(decoders=16, decode_s=0.001, hop_s=0.0002, respond_s=0.0003)
        return Machine("gpu", f"{about} {images}", WIDTHS, _gpu_cells(), correct, front, GPU_MAX_IMAGES)
    raise ValueError(f"profile {name!r} does not exist; there are 'cpu', 'gpu' and files of measured latencies")


def _cpu_cells() -> Cells:
    return {
        (Width(ratio), batch): _spread(float(np.interp(batch, (1, 4, 16), medians_ms)), CPU_SIGMA)
        for ratio, medians_ms in CPU_MS.items()
        for batch in buckets_up_to(16)
    }


def _gpu_cells() -> Cells:
    shape = variant("deit-s", image_size=224, patch_size=16, num_classes=1000, granularity=0.125)
    macs = {width: cost_of(shape, width).macs / cost_of(shape, WIDTHS[-1]).macs for width in WIDTHS}
    return {
        (width, batch): _spread(GPU_LAUNCH_MS + GPU_IMAGE_MS * share * batch, GPU_SIGMA)
        for width, share in macs.items()
        for batch in buckets_up_to(GPU_MAX_BATCH)
    }


def _spread(median_ms: float, sigma: float) -> tuple[float, ...]:
    """Equally likely seconds, log-normal: ``sigma`` is the standard deviation of their logarithm."""
    normal = NormalDist()
    return tuple(median_ms / 1000 * math.exp(sigma * normal.inv_cdf(level)) for level in LEVELS.tolist())


# -- measured profiles


def read_machine(path: Path, checkpoint: Path) -> Machine:
    """The machine of a measured profile: a file that ``scala-serve profile --json`` wrote, or one that a server keeps.

    The former tells p50 and p99 of a cell, through which a log-normal distribution is laid; the latter quantiles, which
    are joined by lines. Images and widths are the checkpoint's; decoding and answering take as long as on the built-in
    machine with batches of that size. Raises OSError, CheckpointError, and ValueError for a
    file that is neither, or lacks what the checkpoint has.
    """
    try:
        cells = {_place(cell): _samples(cell) for cell in json.loads(path.read_bytes())["cells"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a measured profile ({type(error).__name__}: {error}): write one with scala-serve profile "
            "--json > FILE"
        ) from None
    if not cells:
        raise ValueError(f"{path} has no cell: write one with scala-serve profile --json > FILE")
    widths = tuple(sorted({width for width, _ in cells}))
    nothing = np.zeros((1, len(widths)), np.bool_)
    alike = built_in("cpu" if max(batch for _, batch in cells) <= 16 else "gpu")
    return with_checkpoint(
        Machine(path.stem, f"Latencies: {path.name}.", widths, cells, nothing, alike.frontend, alike.max_images),
        checkpoint,
    )


def _place(cell: Mapping[str, Any]) -> tuple[Width, int]:
    return Width(cell["width"]), int(cell["batch"])


def _samples(cell: Mapping[str, Any]) -> tuple[float, ...]:
    if "ms" in cell:
        return _between(sorted(float(ms) for ms in cell["ms"]))
    p50_ms, p99_ms = float(cell["p50_ms"]), float(cell["p99_ms"])
    if not 0 < p50_ms <= p99_ms < math.inf:
        raise ValueError(f"a p50 of {p50_ms} ms and a p99 of {p99_ms} ms")
    return _spread(p50_ms, math.log(p99_ms / p50_ms) / NormalDist().inv_cdf(0.99))


def _between(quantiles_ms: Sequence[float]) -> tuple[float, ...]:
    """Equally likely seconds on the lines through quantiles as ``profile_store.quantiles`` takes them."""
    count = len(quantiles_ms)
    if not count or not 0 < quantiles_ms[0] <= quantiles_ms[-1] < math.inf:
        raise ValueError(f"latencies {quantiles_ms} ms")
    levels = [(i + 0.5) / count for i in range(count)]
    if count >= MIN_SAMPLES:
        levels[-2:] = 0.99, 1.0
    return tuple((np.interp(LEVELS, levels, quantiles_ms) / 1000).tolist())


def with_checkpoint(machine: Machine, folder: Path) -> Machine:
    """The machine, with the images that a checkpoint was evaluated on and the widths that it was trained for.

    Raises CheckpointError, and ValueError when it was not evaluated or has a width that was not measured.
    """
    matrix = read_correctness(folder)
    if matrix is None:
        raise ValueError(f"{folder} has no record of which images were right: {REMEDY}")
    if unknown := set(matrix.widths) - set(machine.widths):
        raise ValueError(
            f"{folder} has the width {min(unknown)}, of which {machine.name} has no latency; it has "
            f"{', '.join(map(str, machine.widths))}: take a profile of this checkpoint"
        )
    cells = {(width, batch): s for (width, batch), s in machine.cells.items() if width in matrix.widths}
    about = f"{machine.about} Images: {matrix.dataset}, as {read_card(folder)[1]['name']} classifies them."
    return replace(machine, about=about, widths=matrix.widths, cells=cells, correct=matrix.correct)
