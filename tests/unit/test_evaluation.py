"""Accuracy per width, its interval, and the card that tells both."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scala_model import ScalaConfig, ScalaViT, Width, load_checkpoint, save_checkpoint
from scala_model.checkpoint import read_checkpoint, write_card
from scala_model.normalise import normalise
from scala_model.preprocess import Preprocessing
from scala_model.train.data import ImageSet
from scala_model.train.evaluation import Evaluation, evaluate, measured_card, wilson_interval

# -- the interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # by hand: n = z^2 makes the ends of 0 successes 0 and z^2 / (2 n) = 1/2; one trial: z^2 / (1 + z^2) = 0.7935
        (0, 1, 0.0000, 0.7935),
        (1, 1, 0.2065, 1.0000),
        (20, 20, 0.8389, 1.0000),
        (5000, 10000, 0.4902, 0.5098),
    ],
)
def test_wilson_intervals_of_the_literature(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_intervals_stay_within_0_and_1_and_hold_the_proportion() -> None:
    for n in (1, 2, 7, 1000):
        for successes in {0, 1, n // 2, n - 1, n}:
            low, high = wilson_interval(successes, n)
            assert 0 <= low <= successes / n <= high <= 1


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_no_proportion_has_no_interval(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="are no proportion"):
        wilson_interval(successes, n)


# -- evaluation


def toy(kind: str = "token") -> ScalaViT:
    torch.manual_seed(6)
    shape: dict[str, Any] = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    return ScalaViT(
        ScalaConfig(
            **shape,
            mlp_ratio=2.0,
            num_classes=3,
            smallest=0.5,
            largest=1.0,
            granularity=0.25,
            distilled=kind == "distilled",
        )
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = toy()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # so that widths differ in what they answer
    preprocessing = {"image_size": 8, "mean": [0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7]}
    save_checkpoint(tmp_path / "toy", model, {"preprocessing": preprocessing})
    return tmp_path / "toy"


def images(count: int = 50) -> ImageSet:
    generator = torch.Generator().manual_seed(8)
    pixels = torch.randint(0, 256, (count, 8, 8, 3), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.randint(0, 3, (count,), generator=generator))


def test_says_for_each_width_which_images_were_right(folder: Path) -> None:
    model, data = load_checkpoint(folder), images()
    result = evaluate(model, data, batch_size=16)
    assert list(result.correct) == [Width(0.5), Width(0.75), Width(1.0)]
    assert result.num_images == 50
    spec = Preprocessing(8, mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7))
    for width, correct in result.correct.items():
        with torch.inference_mode():
            expected = model(normalise(data.pixels, spec), width).argmax(-1) == data.labels
        assert correct.dtype == np.bool_
        assert correct.tolist() == expected.tolist()
        assert result.accuracy(width) == pytest.approx(expected.float().mean().item())
        assert result.interval(width) == wilson_interval(int(expected.sum()), 50)
    assert len({tuple(correct) for correct in result.correct.values()}) == 3


def test_progress_counts_every_image_once_a_width(folder: Path) -> None:
    steps: list[int] = []
    evaluate(load_checkpoint(folder), images(), batch_size=20, progress=steps.append)
    assert steps == [20, 20, 10] * 3


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
    measured = measured_card(card, Evaluation(correct), "toys val")
    assert card == before
    assert [entry["accuracy"] for entry in measured["widths"]] == [0.3802, 0.5703, 1.0]
    assert measured["widths"][0]["accuracy_ci95"] == [round(bound, 4) for bound in wilson_interval(100, 263)]
    assert measured["evaluation"] == {"dataset": "toys val", "images": 263}
    write_card(folder, measured)
    assert read_checkpoint(folder).card == measured
