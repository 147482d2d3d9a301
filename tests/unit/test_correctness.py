"""Which images each width got right comes back bit by bit, and two networks are compared image by image."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from scala_model.checkpoint import CheckpointError
from scala_model.correctness import (
    Correctness,
    dominated_widths,
    paired_difference,
    read_correctness,
    wilson_interval,
    write_correctness,
)
from scala_model.width import Width
from tests.unit.toy import CONFIG, write_toy

LABELS_SHA256 = "0123456789abcdef" * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "toy")


def matrix(num_images: int = 21, widths: tuple[Width, ...] = CONFIG.widths) -> Correctness:
    correct = np.random.default_rng(num_images).random((num_images, len(widths))) < 0.6
    return Correctness(widths, correct, "toys val, häufig", LABELS_SHA256)


# -- the file


@pytest.mark.parametrize("num_images", [1, 7, 8, 9, 16, 1001])
def test_every_bit_comes_back(folder: Path, num_images: int) -> None:
    told = matrix(num_images)
    write_correctness(folder, told)
    read = read_correctness(folder)
    assert read is not None
    assert read.widths == CONFIG.widths
    assert read.dataset == "toys val, häufig"
    assert read.labels_sha256 == LABELS_SHA256
    assert read.num_images == num_images
    assert read.correct.dtype == np.bool_
    assert np.array_equal(read.correct, told.correct)


def test_ten_thousand_images_are_five_kilobytes_and_always_the_same(folder: Path) -> None:
    contents = set()
    for _ in range(8):
        write_correctness(folder, matrix(10_000))
        contents.add((folder / "correctness.safetensors").read_bytes())
    assert len(contents) == 1
    assert len(contents.pop()) < 5_500
    assert len(list(folder.glob(".*"))) == 0


def test_a_checkpoint_may_have_none(folder: Path) -> None:
    assert read_correctness(folder) is None


def test_without_a_checkpoint_there_is_nothing_to_read_or_write(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        read_correctness(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        write_correctness(tmp_path, matrix())
    assert not list(tmp_path.iterdir())


def test_a_matrix_of_other_weights_is_refused(folder: Path) -> None:
    write_correctness(folder, matrix())
    card = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(card | {"weights_sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match=r"other weights than config.json describes: run scala-serve evaluate"):
        read_correctness(folder)


def test_a_matrix_of_other_widths_is_not_written(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is of the widths 0.25, 0.5; .* has 0.25, 0.5, 0.75, 1$"):
        write_correctness(folder, matrix(widths=CONFIG.widths[:2]))
    assert read_correctness(folder) is None


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, NDArray[Any]]], object]) -> None:
    """Change what the file tells and holds."""
    path = folder / "correctness.safetensors"
    with safetensors.safe_open(path, framework="np") as file:
        told, arrays = json.loads(file.metadata()["correctness"]), {"correct": file.get_tensor("correct")}
    change(told, arrays)
    path.write_bytes(safetensors.numpy.save(arrays, {"correctness": json.dumps(told)}))


@pytest.mark.parametrize(
    "change",
    [
        lambda told, arrays: told.pop("weights_sha256"),
        lambda told, arrays: told.pop("dataset"),
        lambda told, arrays: told.pop("labels_sha256"),
        lambda told, arrays: told.update(labels_sha256=None),
        lambda told, arrays: told.update(labels_sha256=LABELS_SHA256[1:]),
        lambda told, arrays: told.update(labels_sha256=LABELS_SHA256.upper()),
        lambda told, arrays: told.update(images=25),
        lambda told, arrays: told.update(images=16),
        lambda told, arrays: told.update(images=0),
        lambda told, arrays: told.update(images="21"),
        lambda told, arrays: told.update(widths=[0.25, 0.5]),
        lambda told, arrays: told.update(widths=[0.25, 0.5, 0.75, 2.0]),
        lambda told, arrays: told.update(widths=None),
        lambda told, arrays: arrays.update(correct=arrays["correct"].astype(np.float32)),
        lambda told, arrays: arrays.update(correct=arrays["correct"][:2]),
        lambda told, arrays: arrays.pop("correct"),
    ],
)
def test_a_tampered_matrix_is_refused(folder: Path, change: Callable[..., object]) -> None:
    write_correctness(folder, matrix(21))
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=r"is not a correctness matrix that we can read .*: run scala-serve eval"):
        read_correctness(folder)


def test_a_matrix_of_as_many_other_widths_is_refused(folder: Path) -> None:
    write_correctness(folder, matrix())
    rewrite(folder, lambda told, arrays: told.update(widths=[0.25, 0.5, 0.625, 1.0]))
    with pytest.raises(CheckpointError, match=r"is of the widths 0.25, 0.5, 0.625, 1, the checkpoint has 0.25, 0.5, 0"):
        read_correctness(folder)


@pytest.mark.parametrize("content", [b"", b"nothing", safetensors.numpy.save({"correct": np.zeros((3, 4), np.uint8)})])
def test_a_file_that_is_no_matrix_is_refused(folder: Path, content: bytes) -> None:
    (folder / "correctness.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a correctness matrix that we can read"):
        read_correctness(folder)


# -- the value


def test_accuracies_are_by_width() -> None:
    correct = np.array([[True, True], [False, True], [False, True], [False, False]])
    told = Correctness((Width(0.5), Width(1.0)), correct, "toys", LABELS_SHA256)
    assert [told.accuracy(width) for width in told.widths] == [0.25, 0.75]
    assert told.interval(Width(1.0)) == wilson_interval(3, 4)
    assert told.at(Width(0.5)).tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match=r"width 0.75 was not measured; measured widths: 0.5, 1$"):
        told.at(Width(0.75))


@pytest.mark.parametrize(
    "correct",
    [np.ones((0, 2), np.bool_), np.ones((3, 1), np.bool_), np.ones(2, np.bool_), np.ones((3, 2), np.uint8)],
)
def test_what_is_no_matrix_is_refused(correct: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"of the 2 widths; got (bool|uint8) of shape \("):
        Correctness((Width(0.5), Width(1.0)), correct, "toys", LABELS_SHA256)


@pytest.mark.parametrize("digest", ["", "0" * 63, "g" * 64, "0" * 64 + "\n"])
def test_what_is_no_digest_of_labels_is_refused(digest: str) -> None:
    with pytest.raises(ValueError, match=r"SHA-256 has 64 hexadecimal digits in lower case; got '"):
        Correctness((Width(0.5),), np.ones((3, 1), np.bool_), "toys", digest)


@pytest.mark.parametrize(
    ("accuracy", "dominated"),
    [
        ({0.25: 0.3, 0.5: 0.4, 0.75: 0.5, 1.0: 0.6}, []),
        ({0.25: 0.3, 0.5: 0.4, 0.75: 0.4, 1.0: 0.6}, [0.75]),  # of two equals the narrower stays
        ({1.0: 0.6, 0.75: 0.61, 0.5: 0.4, 0.25: 0.3}, [1.0]),  # in any order
        ({0.25: 0.5, 0.5: 0.3, 0.75: 0.4, 1.0: 0.6}, [0.5, 0.75]),  # 0.75 beats its neighbour, not the narrowest
        ({0.25: 0.0, 0.5: 0.0}, [0.5]),
        ({0.5: 0.1}, []),
        ({}, []),
    ],
)
def test_a_width_no_more_accurate_than_a_narrower_one_is_dominated(
    accuracy: dict[float, float], dominated: list[float]
) -> None:
    assert dominated_widths({Width(ratio): share for ratio, share in accuracy.items()}) == [*map(Width, dominated)]


# -- the interval of one accuracy


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


# -- the interval of a difference


def answers(both: int, only_a: int, only_b: int, neither: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    a = np.repeat([True, True, False, False], [both, only_a, only_b, neither])
    b = np.repeat([True, False, True, False], [both, only_a, only_b, neither])
    return a, b


@pytest.mark.parametrize(
    ("counts", "difference", "low", "high"),
    [
        # Fagerland et al. 2014, Statistics in Medicine 33, table V: Wald with the adjustment of Bonett and Price
        ((1, 1, 7, 12), -0.286, -0.508, -0.013),
        # by hand: p = 15/100, q = 5/100, so 0.1 ± 1.95996 sqrt((0.2 - 0.01) / 100) = 0.1 ± 0.08543
        ((50, 14, 4, 30), 10 / 98, 0.0146, 0.1854),
        # by hand: p = q = 1/100, so 0 ± 1.95996 sqrt(0.02 / 100) = ± 0.02772
        ((60, 0, 0, 38), 0.0, -0.0277, 0.0277),
        # by hand: p = 2/3, q = 1/3, so 1/3 ± 1.95996 sqrt((1 - 1/9) / 3) = 1/3 ± 1.0669
        ((0, 1, 0, 0), 1.0, -0.7335, 1.0),
    ],
)
def test_paired_intervals_of_the_literature_and_by_hand(
    counts: tuple[int, int, int, int], difference: float, low: float, high: float
) -> None:
    a, b = answers(*counts)
    assert paired_difference(a, b) == pytest.approx((difference, low, high), abs=6e-4)
    assert paired_difference(b, a) == pytest.approx((-difference, -high, -low), abs=6e-4)


@pytest.mark.parametrize(("only_a", "only_b"), [(0.02, 0.02), (0.10, 0.04), (0.30, 0.05)])
def test_the_paired_interval_holds_the_truth_in_95_of_100_samples(only_a: float, only_b: float) -> None:
    draw, n, held = np.random.default_rng(1), 250, 0
    for kind in draw.choice(3, size=(3000, n), p=[1 - only_a - only_b, only_a, only_b]):
        _, low, high = paired_difference((kind == 1) | (kind == 0), (kind == 2) | (kind == 0))
        held += low <= only_a - only_b <= high
    assert 0.935 <= held / 3000 <= 0.975


def test_the_interval_of_a_mean_over_widths_by_hand() -> None:
    a = np.array([[True, True], [True, False], [True, False], [False, False]])
    b = np.array([[False, False], [False, False], [False, True], [False, False]])
    # d = 1, 1/2, 0, 0 and the added 1 and -1: mean 1.5 / 6 = 1/4, variance (1 + 1/4 + 2) / 6 - 1/16 = 23/48,
    # so 1/4 ± 1.95996 sqrt(23 / 48 / 6) = 1/4 ± 0.55388
    assert paired_difference(a, b) == pytest.approx((3 / 8, -0.30388, 0.80388), abs=1e-5)
    assert paired_difference(b, a) == pytest.approx((-3 / 8, -0.80388, 0.30388), abs=1e-5)


def test_widths_that_answer_alike_tell_no_more_than_one() -> None:
    a, b = answers(60, 20, 10, 30)
    alike_a, alike_b = (np.repeat(answer[:, None], 5, axis=1) for answer in (a, b))
    assert paired_difference(alike_a, alike_b) == pytest.approx(paired_difference(a, b))


def test_the_interval_of_a_mean_over_widths_holds_the_truth_in_95_of_100_samples() -> None:
    draw, n, held = np.random.default_rng(2), 250, 0
    for _ in range(2000):
        hardness = draw.random((n, 1))  # of an image, for both methods and at every width
        a = hardness + 0.3 * draw.normal(size=(n, 3)) < np.array([0.45, 0.55, 0.65])
        b = hardness + 0.3 * draw.normal(size=(n, 3)) < np.array([0.45, 0.55, 0.65])
        _, low, high = paired_difference(a, b)
        held += low <= 0 <= high
    assert 0.935 <= held / 2000 <= 0.97


def test_pairing_tells_apart_what_two_intervals_cannot() -> None:
    a, b = answers(6000, 300, 200, 3500)
    _, low, _ = paired_difference(a, b)
    assert low > 0
    assert wilson_interval(int(a.sum()), len(a))[0] < wilson_interval(int(b.sum()), len(b))[1]


@pytest.mark.parametrize(
    ("a", "b"), [((3,), (4,)), ((0,), (0,)), ((3, 2), (3, 1)), ((2,), (2, 1)), ((2, 0), (2, 0)), ((2, 2, 2), (2, 2, 2))]
)
def test_answers_to_different_images_are_not_paired(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"cannot be paired: give both for the same images"):
        paired_difference(np.ones(a, np.bool_), np.ones(b, np.bool_))
