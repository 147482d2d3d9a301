"""Top-1 accuracy of every width, with its 95 % interval, and the card that records it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scala_model.card import preprocessing_from_card
from scala_model.normalise import normalise
from scala_model.train.data import ImageSet
from scala_model.vit import ScalaViT
from scala_model.width import Width

Z_95 = 1.959963984540054  # the standard normal's 97.5 % quantile


@dataclass(frozen=True)
class Evaluation:
    """``correct`` says for each width which images (N,) it classified correctly."""

    correct: Mapping[Width, NDArray[np.bool_]]

    @property
    def num_images(self) -> int:
        return len(next(iter(self.correct.values())))

    def accuracy(self, width: Width) -> float:
        return float(self.correct[width].mean())

    def interval(self, width: Width) -> tuple[float, float]:
        """The 95 % Wilson interval of the accuracy."""
        return wilson_interval(int(self.correct[width].sum()), self.num_images)


@torch.inference_mode()
def evaluate(
    model: ScalaViT,
    images: ImageSet,
    *,
    device: str = "cpu",
    batch_size: int = 500,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Run every width's dense sub-network in float32 over images prepared as ``model.card`` says.

    ``progress`` is told how many images each batch has, once a width. Raises ValueError when the images have another
    size than the network's, or labels that it does not have.
    """
    spec, size, num_classes = preprocessing_from_card(model.card), model.config.image_size, model.config.num_classes
    if images.pixels.shape[1:] != (size, size, 3):
        raise ValueError(f"images have the shape {tuple(images.pixels.shape[1:])}; the network takes {(size, size, 3)}")
    if not 0 <= int(images.labels.min()) <= int(images.labels.max()) < num_classes:
        raise ValueError(f"labels are not those of a network with {num_classes} classes")
    batches = list(zip(torch.split(images.pixels, batch_size), torch.split(images.labels, batch_size), strict=True))
    correct: dict[Width, NDArray[np.bool_]] = {}
    for width in model.config.widths:
        network = model.subnet(width).eval().float().to(device)
        hits = []
        for pixels, labels in batches:
            logits = network(normalise(pixels.to(device), spec))
            hits.append(logits.argmax(-1).cpu() == labels.cpu())
            if progress is not None:
                progress(len(labels))
        correct[width] = torch.cat(hits).numpy()
    return Evaluation(correct)


def measured_card(card: Mapping[str, Any], evaluation: Evaluation, dataset_name: str) -> dict[str, Any]:
    """A copy of ``card`` with each width's accuracy and interval (4 decimals) and what they were measured on."""
    widths = []
    for entry in card["widths"]:
        width = Width(entry["width"])
        interval = [round(bound, 4) for bound in evaluation.interval(width)]
        widths.append({**entry, "accuracy": round(evaluation.accuracy(width), 4), "accuracy_ci95": interval})
    return {**card, "widths": widths, "evaluation": {"dataset": dataset_name, "images": evaluation.num_images}}


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927): never outside 0..1, sound near both ends.

    Raises ValueError unless 0 <= successes <= n and n >= 1.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n} trials are no proportion")
    share, z2 = successes / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))
