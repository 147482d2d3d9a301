"""Whether every engine that can run here answers as the specification does, on real images at every width.

    python -m benchmarks.agreement [--checkpoint DIR] [--data DIR]

The specification is the sliced network, eager, in float32. An engine in bfloat16 must give the same first answer on
99 % of the validation images and be as accurate within 0.3 percentage points; one in float32 must give every
probability within 0.0001. Three minutes on two cores for the checkpoint that comes with the package.

Prints a table and, last, one line of JSON. Ends with 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from scala_model.card import preprocessing_from_card
from scala_model.checkpoint import Checkpoint, build_model, default_checkpoint, read_checkpoint
from scala_model.normalise import normalise
from scala_model.train.data import ImageSet
from scala_model.train.layouts import open_split
from scala_model.vit import ScalaViT
from scala_model.width import Width
from server.cgroup import available_cpus
from server.engine.contract import Engine
from server.engine.cuda_graphs import CudaGraphsEngine
from server.engine.openvino_engine import OpenVinoEngine, core
from server.engine.torch_engine import TorchEngine

Precision = Literal["f32", "bf16"]
Probabilities = NDArray[np.float32]
BATCH = 16
MIN_EQUAL, MAX_POINTS = 0.99, 0.3  # bfloat16
MAX_DIFFERENCE = 1e-4  # float32


@dataclass(frozen=True)
class Agreement:
    """An engine at a width, on the images of a set; ``expected_accuracy`` is the specification's, both in 0..1.

    ``equal``: share of the images with the same first answer; ``largest_difference``: of any probability.
    """

    engine: str
    precision: Precision
    width: Width
    equal: float
    accuracy: float
    expected_accuracy: float
    largest_difference: float

    @property
    def points(self) -> float:
        """Accuracy gained, in percentage points; rounded, so that 30 images of 10,000 are 0.3 and nothing more."""
        return round(100 * (self.accuracy - self.expected_accuracy), 6)

    @property
    def within_bounds(self) -> bool:
        if self.precision == "f32":
            return self.largest_difference <= MAX_DIFFERENCE
        return self.equal >= MIN_EQUAL and abs(self.points) <= MAX_POINTS


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", default=default_checkpoint())
    parser.add_argument("--data", type=Path, metavar="DIR", default=_default_data(), help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        checkpoint = read_checkpoint(options.checkpoint)
        images = open_split(options.data, "val").decode_all(checkpoint.preprocessing)
        found = list(agreements(checkpoint, images))
    except ValueError as error:
        parser.error(str(error))
    _print(found, len(images.labels))
    print(json.dumps(as_json(found, str(checkpoint.card["name"]), len(images.labels))))
    sys.exit(0 if all(one.within_bounds for one in found) else 1)


def _default_data() -> Path:
    root = Path(__file__).resolve().parents[1]
    return (root / os.environ.get("SCALA_DATA_DIR", "../shared/data") / "tiny-imagenet").resolve()


def engines() -> dict[tuple[str, Precision], Callable[[Checkpoint], Engine]]:
    """Every engine that can run here, in each of its precisions."""
    threads, has_cuda = max(1, math.floor(available_cpus())), torch.cuda.is_available()
    device = "cuda" if has_cuda else "cpu"
    found: dict[tuple[str, Precision], Callable[[Checkpoint], Engine]] = {
        ("torch", "f32"): lambda given: TorchEngine(given, device=device, threads=threads, max_batch=BATCH),
        ("openvino", "f32"): lambda given: OpenVinoEngine(given, threads=threads, max_batch=BATCH, precision="f32"),
    }
    if "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        found["openvino", "bf16"] = lambda given: OpenVinoEngine(
            given, threads=threads, max_batch=BATCH, precision="bf16"
        )
    if has_cuda:
        found["cuda_graphs", "bf16"] = lambda given: CudaGraphsEngine(given, device="cuda", max_batch=BATCH)
    return found


def agreements(checkpoint: Checkpoint, images: ImageSet) -> Iterator[Agreement]:
    """Each engine at each width.

    Raises ValueError when the images have labels that the network does not have.
    """
    num_classes, labels = checkpoint.config.num_classes, images.labels.numpy()
    if labels.max() >= num_classes:
        raise ValueError(f"the images have the label {labels.max()}; the network has {num_classes} classes, from 0")
    model, pixels = build_model(checkpoint), images.pixels.numpy()
    expected = {width: in_batches(specification(model, width), pixels) for width in model.config.widths}
    for (name, precision), build in engines().items():
        engine = build(checkpoint)
        for width in model.config.widths:
            engine.load(width, engine.max_batch)
            answered = in_batches(lambda batch, width=width: engine.run(batch, width), pixels)  # type: ignore[misc] # noqa: B023
            yield compare(name, precision, width, answered, expected[width], labels)
            print(f"{name} {precision}, width {width}: done", file=sys.stderr, flush=True)
        engine.close()


def specification(model: ScalaViT, width: Width) -> Callable[[NDArray[np.uint8]], Probabilities]:
    """The eager float32 network at ``width``, from uint8 (B, S, S, 3) to probabilities (B, classes)."""
    spec = preprocessing_from_card(model.card)

    @torch.inference_mode()
    def run(pixels: NDArray[np.uint8]) -> Probabilities:
        logits = model(normalise(torch.from_numpy(pixels), spec), width)
        probabilities: Probabilities = logits.softmax(-1).numpy()
        return probabilities

    return run


def in_batches(run: Callable[[NDArray[np.uint8]], Probabilities], pixels: NDArray[np.uint8]) -> Probabilities:
    """The answers (N, classes) to all images (N, S, S, 3), the last batch as small as it comes."""
    return np.concatenate([run(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)])


def compare(
    engine: str,
    precision: Precision,
    width: Width,
    answered: Probabilities,
    expected: Probabilities,
    labels: NDArray[np.int64],
) -> Agreement:
    """Probabilities (N, classes) beside those expected, and beside the labels (N)."""
    top1, expected_top1 = answered.argmax(1), expected.argmax(1)
    return Agreement(
        engine=engine,
        precision=precision,
        width=width,
        equal=float((top1 == expected_top1).mean()),
        accuracy=float((top1 == labels).mean()),
        expected_accuracy=float((expected_top1 == labels).mean()),
        largest_difference=float(np.abs(answered - expected).max()),
    )


def as_json(found: Sequence[Agreement], checkpoint: str, num_images: int) -> dict[str, Any]:
    """The comparison as data: shares in 0..1, differences of accuracy in percentage points."""
    return {
        "checkpoint": checkpoint,
        "images": num_images,
        "rows": [
            {
                "engine": one.engine,
                "precision": one.precision,
                "width": float(one.width),
                "equal_top1": round(one.equal, 4),
                "accuracy": round(one.accuracy, 4),
                "expected_accuracy": round(one.expected_accuracy, 4),
                "difference_points": round(one.points, 2),
                "largest_difference": float(f"{one.largest_difference:.3g}"),
                "within_bounds": one.within_bounds,
            }
            for one in found
        ],
        "within_bounds": all(one.within_bounds for one in found),
    }


def _print(found: Sequence[Agreement], num_images: int) -> None:
    table = Table(
        "engine", "precision", "width", "equal top-1 %", "accuracy %", "expected %", "points", "largest difference", ""
    )
    for one in found:
        table.add_row(
            one.engine,
            one.precision,
            str(one.width),
            f"{100 * one.equal:.2f}",
            f"{100 * one.accuracy:.2f}",
            f"{100 * one.expected_accuracy:.2f}",
            f"{one.points:+.2f}",
            f"{one.largest_difference:.2g}",
            "" if one.within_bounds else "outside",
        )
    Console(width=120).print(table)
    print(f"{num_images} images")


if __name__ == "__main__":
    main()
