"""What every width makes of a set of images, and the card that records it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scala_model.card import preprocessing_from_card
from scala_model.correctness import Correctness, wilson_interval
from scala_model.normalise import Normalise
from scala_model.train.data import Images
from scala_model.vit import ScalaViT
from scala_model.width import Width

NUM_BINS = 15  # of confidence, as in Guo et al. 2017


@dataclass(frozen=True)
class Evaluation:
    """What each width made of the images (N), whose ``labels`` are int64 (N).

    ``correct`` and ``correct_top5``: whether its first answer was right, and whether one of its first five was (of all
    answers, where there are fewer classes); ``confidence``: the probability that it gave its first answer.
    """

    labels: NDArray[np.int64]
    correct: Mapping[Width, NDArray[np.bool_]]
    correct_top5: Mapping[Width, NDArray[np.bool_]]
    confidence: Mapping[Width, NDArray[np.float32]]

    @property
    def num_images(self) -> int:
        return len(self.labels)

    def accuracy(self, width: Width) -> float:
        return float(self.correct[width].mean())

    def interval(self, width: Width) -> tuple[float, float]:
        """The 95 % Wilson interval of the accuracy."""
        return wilson_interval(int(self.correct[width].sum()), self.num_images)

    def top5(self, width: Width) -> float:
        return float(self.correct_top5[width].mean())

    def top5_interval(self, width: Width) -> tuple[float, float]:
        """The 95 % Wilson interval of the top-5 accuracy."""
        return wilson_interval(int(self.correct_top5[width].sum()), self.num_images)

    def calibration_error(self, width: Width) -> float:
        return expected_calibration_error(self.correct[width], self.confidence[width])

    def matrix(self, dataset_name: str) -> Correctness:
        """Which images each width got right, to be kept beside the checkpoint."""
        correct = np.stack(list(self.correct.values()), axis=1)
        labels_sha256 = hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()
        return Correctness(tuple(self.correct), correct, dataset_name, labels_sha256)


@torch.inference_mode()
def evaluate(
    model: ScalaViT,
    images: Images,
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
    if not 0 <= int(images.labels.min()) <= int(images.labels.max()) < num_classes:
        raise ValueError(f"labels are not those of a network with {num_classes} classes")
    place = torch.device(device)
    normalise = Normalise(spec).to(place)
    networks = {width: model.subnet(width).eval().float().to(place) for width in model.config.widths}
    outcomes: dict[Width, list[Tensor]] = {width: [] for width in networks}
    chunks = torch.split(torch.arange(len(images.labels)), batch_size)
    batches = zip(images.batches(chunks, place), torch.split(images.labels.to(place), batch_size), strict=True)
    for pixels, labels in batches:  # outside, so that images which are decoded as they stream in are decoded once
        if pixels.shape[1:] != (size, size, 3):
            raise ValueError(f"images have the shape {tuple(pixels.shape[1:])}; the network takes {(size, size, 3)}")
        normalised = normalise(pixels)
        for width, network in networks.items():
            outcomes[width].append(_outcome(network(normalised), labels))
            if progress is not None:
                progress(len(labels))
    return _collected(images.labels, outcomes)


def _outcome(logits: Tensor, labels: Tensor) -> Tensor:
    """Per image: top-1 hit, top-5 hit, confidence; float32 (B, 3), left on the device so that nothing waits for it."""
    hits = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]
    return torch.stack([hits[:, 0], hits.any(-1), logits.softmax(-1).amax(-1)], dim=-1)


def _collected(labels: Tensor, outcomes: Mapping[Width, list[Tensor]]) -> Evaluation:
    whole = {width: torch.cat(parts).cpu().numpy() for width, parts in outcomes.items()}
    return Evaluation(
        labels=labels.cpu().numpy(),
        correct={width: outcome[:, 0] == 1 for width, outcome in whole.items()},
        correct_top5={width: outcome[:, 1] == 1 for width, outcome in whole.items()},
        confidence={width: outcome[:, 2] for width, outcome in whole.items()},
    )


def measured_card(card: Mapping[str, Any], evaluation: Evaluation, dataset_name: str) -> dict[str, Any]:
    """A copy of ``card`` with what was measured of each width (4 decimals) and what it was measured on."""
    widths = [{**entry, **_measured(evaluation, Width(entry["width"]))} for entry in card["widths"]]
    return {**card, "widths": widths, "evaluation": {"dataset": dataset_name, "images": evaluation.num_images}}


def _measured(evaluation: Evaluation, width: Width) -> dict[str, Any]:
    return {
        "accuracy": round(evaluation.accuracy(width), 4),
        "accuracy_ci95": [round(bound, 4) for bound in evaluation.interval(width)],
        "accuracy_top5": round(evaluation.top5(width), 4),
        "accuracy_top5_ci95": [round(bound, 4) for bound in evaluation.top5_interval(width)],
        "calibration_error": round(evaluation.calibration_error(width), 4),
    }


def expected_calibration_error(correct: NDArray[np.bool_], confidence: NDArray[np.float32]) -> float:
    """The mean distance between accuracy and confidence, over images (N) binned by confidence (Guo et al. 2017, eq. 3).

    Bin m of 15 holds the confidences in ((m - 1) / 15, m / 15].
    """
    confidence_64 = confidence.astype(np.float64)
    bins = np.clip(np.ceil(confidence_64 * NUM_BINS) - 1, 0, NUM_BINS - 1).astype(np.int64)
    gaps = np.bincount(bins, weights=correct - confidence_64)  # a bin's size times its distance
    return float(np.abs(gaps).sum() / len(correct))
