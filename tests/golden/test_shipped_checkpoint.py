"""The embedded checkpoint is what its card says: the matrix of what each width gets right repeats on real images."""

from __future__ import annotations

from pathlib import Path

import pytest

from scala_model import load_checkpoint
from scala_model.checkpoint import default_checkpoint
from scala_model.correctness import read_correctness
from scala_model.preprocess import Preprocessing
from scala_model.train.data import ImageSet
from scala_model.train.evaluation import evaluate
from scala_model.train.layouts import open_split


def test_the_card_has_the_accuracies_of_the_matrix() -> None:
    matrix = read_correctness(default_checkpoint())
    card = load_checkpoint(default_checkpoint()).card
    assert matrix is not None
    assert matrix.num_images == card["evaluation"]["images"] == 10_000
    for width, entry in zip(matrix.widths, card["widths"], strict=True):
        assert matrix.accuracy(width) == pytest.approx(entry["accuracy"], abs=5e-5)
        assert matrix.interval(width) == pytest.approx(entry["accuracy_ci95"], abs=5e-5)


def test_the_first_images_are_classified_as_the_matrix_says(shared_data: Path) -> None:
    """But for a rare tie: processors round differently."""
    model, matrix = load_checkpoint(default_checkpoint()), read_correctness(default_checkpoint())
    assert matrix is not None
    images = open_split(shared_data / "tiny-imagenet", "val").decode_all(Preprocessing(model.config.image_size))
    count = 500
    result = evaluate(model, ImageSet(images.pixels[:count], images.labels[:count]))
    for width in model.config.widths:
        assert (result.correct[width] == matrix.at(width)[:count]).mean() >= 0.995
