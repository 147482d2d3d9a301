"""What is measured of each width, and the card that tells it."""

from __future__ import annotations

import copy
import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scala_model import ScalaConfig, ScalaViT, Width, load_checkpoint, save_checkpoint
from scala_model.checkpoint import read_checkpoint, write_card
from scala_model.correctness import wilson_interval
from scala_model.normalise import normalise
from scala_model.preprocess import Preprocessing
from scala_model.train.data import ImageSet
from scala_model.train.evaluation import Evaluation, evaluate, expected_calibration_error, measured_card

# -- evaluation


def toy(num_classes: int = 3) -> ScalaViT:
    torch.manual_seed(6)
    shape: dict[str, Any] = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    widths: dict[str, Any] = {"smallest": 0.5, "largest": 1.0, "granularity": 0.25}
    model = ScalaViT(ScalaConfig(**shape, **widths, mlp_ratio=2.0, num_classes=num_classes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # so that widths differ in what they answer
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = toy()
    preprocessing = {"image_size": 8, "mean": [0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7]}
    save_checkpoint(tmp_path / "toy", model, {"preprocessing": preprocessing})
    return tmp_path / "toy"


def images(count: int = 50, num_classes: int = 3) -> ImageSet:
    generator = torch.Generator().manual_seed(8)
    pixels = torch.randint(0, 256, (count, 8, 8, 3), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.randint(0, num_classes, (count,), generator=generator))


def test_says_for_each_width_which_images_were_right(folder: Path) -> None:
    model, data = load_checkpoint(folder), images()
    result = evaluate(model, data, batch_size=16)
    assert list(result.correct) == [Width(0.5), Width(0.75), Width(1.0)]
    assert result.num_images == 50
    assert result.labels.tolist() == data.labels.tolist()
    spec = Preprocessing(8, mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7))
    for width, correct in result.correct.items():
        with torch.inference_mode():
            expected = model(normalise(data.pixels, spec), width).argmax(-1) == data.labels
        assert correct.dtype == np.bool_
        assert correct.tolist() == expected.tolist()
        assert result.accuracy(width) == pytest.approx(expected.float().mean().item())
        assert result.interval(width) == wilson_interval(int(expected.sum()), 50)
    assert len({tuple(correct) for correct in result.correct.values()}) > 1


def test_says_whether_the_label_is_among_the_first_five_and_how_sure_the_first_was() -> None:
    model, data = toy(num_classes=9), images(60, num_classes=9)
    model.card = {"preprocessing": {"image_size": 8}}
    result = evaluate(model, data, batch_size=25)
    for width in model.config.widths:
        with torch.inference_mode():
            logits = model(normalise(data.pixels, Preprocessing(8)), width).double().numpy()
        of_label = logits[np.arange(60), data.labels.numpy()]
        better = (logits > of_label[:, None]).sum(1)
        assert result.correct[width].tolist() == (better == 0).tolist()
        assert result.correct_top5[width].tolist() == (better < 5).tolist()
        highest = 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)
        assert result.confidence[width].dtype == np.float32
        assert result.confidence[width] == pytest.approx(highest, rel=1e-4)
        hits = int((better < 5).sum())
        assert 0 < hits < 60
        assert result.top5(width) == pytest.approx(hits / 60)
        assert result.top5_interval(width) == wilson_interval(hits, 60)
        expected = expected_calibration_error(better == 0, highest.astype(np.float32))
        assert result.calibration_error(width) == pytest.approx(expected, rel=1e-4)


def test_of_fewer_than_five_classes_the_label_is_always_among_the_first(folder: Path) -> None:
    result = evaluate(load_checkpoint(folder), images())
    assert all(result.top5(width) == 1.0 for width in result.correct)


@dataclass
class Streamed:
    """Images that exist only for as long as they are asked for."""

    held: ImageSet
    asked: list[int] = field(default_factory=list)

    @property
    def labels(self) -> torch.Tensor:
        return self.held.labels

    def batches(self, indices: Iterable[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
        for chosen in indices:
            self.asked += chosen.tolist()
            yield self.held.pixels[chosen].to(device)


def test_each_image_is_read_once_for_all_widths(folder: Path) -> None:
    model, data = load_checkpoint(folder), Streamed(images())
    streamed = evaluate(model, data, batch_size=16)
    assert data.asked == list(range(50))
    for width, correct in evaluate(model, images(), batch_size=50).correct.items():
        assert streamed.correct[width].tolist() == correct.tolist()


def test_progress_counts_every_image_once_a_width(folder: Path) -> None:
    steps: list[int] = []
    evaluate(load_checkpoint(folder), images(), batch_size=20, progress=steps.append)
    assert steps == [20] * 6 + [10] * 3


def test_images_that_are_not_the_networks_are_refused(folder: Path) -> None:
    model, data = load_checkpoint(folder), images()
    with pytest.raises(ValueError, match=r"images have the shape \(8, 4, 3\); the network takes \(8, 8, 3\)"):
        evaluate(model, ImageSet(data.pixels[:, :, :4], data.labels))
    for label in (-1, 3):
        with pytest.raises(ValueError, match="labels are not those of a network with 3 classes"):
            evaluate(model, ImageSet(data.pixels, torch.full_like(data.labels, label)))


def test_the_card_tells_what_was_measured(folder: Path) -> None:
    card = read_checkpoint(folder).card
    before = copy.deepcopy(card)
    hits = {Width(0.5): 100, Width(0.75): 150, Width(1.0): 263}
    correct = {width: np.arange(263) < hit for width, hit in hits.items()}
    top5 = {width: np.arange(263) < hit for width, hit in zip(hits, (200, 250, 263), strict=True)}
    confidence = {width: np.full(263, 0.5, np.float32) for width in hits}
    labels = np.zeros(263, np.int64)
    measured = measured_card(card, Evaluation(labels, correct, top5, confidence), "toys val")
    assert card == before
    assert [entry["accuracy"] for entry in measured["widths"]] == [0.3802, 0.5703, 1.0]
    assert measured["widths"][0]["accuracy_ci95"] == [round(bound, 4) for bound in wilson_interval(100, 263)]
    assert [entry["accuracy_top5"] for entry in measured["widths"]] == [0.7605, 0.9506, 1.0]
    assert measured["widths"][1]["accuracy_top5_ci95"] == [round(bound, 4) for bound in wilson_interval(250, 263)]
    assert [entry["calibration_error"] for entry in measured["widths"]] == [0.1198, 0.0703, 0.5]  # |accuracy - 0.5|
    assert measured["evaluation"] == {"dataset": "toys val", "images": 263}
    write_card(folder, measured)
    assert read_checkpoint(folder).card == measured


def test_the_matrix_has_a_column_a_width() -> None:
    correct = {Width(0.5): np.array([True, False, False]), Width(1.0): np.array([True, True, False])}
    zeros = {width: np.zeros(3, np.float32) for width in correct}
    matrix = Evaluation(np.array([2, 0, 300]), correct, correct, zeros).matrix("toys val")
    assert matrix.widths == (Width(0.5), Width(1.0))
    assert matrix.correct.tolist() == [[True, True], [False, True], [False, False]]
    assert matrix.dataset == "toys val"
    assert matrix.labels_sha256 == hashlib.sha256(struct.pack("<3q", 2, 0, 300)).hexdigest()


def test_the_matrix_tells_the_order_of_the_images(folder: Path) -> None:
    model, data = load_checkpoint(folder), images()
    backwards = ImageSet(data.pixels.flip(0), data.labels.flip(0))
    digests = [evaluate(model, read).matrix("toys val").labels_sha256 for read in (data, Streamed(data), backwards)]
    assert digests[0] == digests[1] != digests[2]


# -- the calibration error


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        # (confidence, right, wrong) each; by hand from Guo et al. 2017, eq. 3
        ([(1.0, 3, 1)], 0.25),
        ([(1.0, 4, 0)], 0.0),
        ([(0.0, 0, 4)], 0.0),
        ([(0.9, 3, 1), (0.5, 3, 3)], 0.4 * 0.15),
        ([(0.95, 0, 5), (0.05, 5, 0)], 0.95),  # as accurate as confident on the whole, never in particular
        ([(0.62, 1, 0), (0.66, 0, 1)], 0.14),  # both in (9/15, 10/15]: |1 - 0.62 - 0.66| / 2
        ([(0.62, 1, 0), (0.68, 0, 1)], 0.53),  # a bin each: (0.38 + 0.68) / 2
    ],
)
def test_calibration_errors_by_hand(answers: list[tuple[float, int, int]], error: float) -> None:
    confidence = np.concatenate([np.full(right + wrong, p, np.float32) for p, right, wrong in answers])
    correct = np.concatenate([np.arange(right + wrong) < right for _, right, wrong in answers])
    assert expected_calibration_error(correct, confidence) == pytest.approx(error, abs=1e-6)


def test_answers_that_are_as_often_right_as_they_say_have_no_calibration_error() -> None:
    draw = np.random.default_rng(0)
    confidence = draw.random(200_000).astype(np.float32)
    assert expected_calibration_error(draw.random(200_000) < confidence, confidence) < 0.01
    assert expected_calibration_error(draw.random(200_000) < confidence**2, confidence) == pytest.approx(
        1 / 6, abs=0.01
    )
