"""Augmentation of whole batches: what each operation may and may not do to pixels and labels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scala_model.normalise import normalise
from scala_model.preprocess import Preprocessing
from scala_model.train.augment import mix, random_resized_crop_and_flip, soft_labels


def test_normalises_each_channel() -> None:
    spec = Preprocessing(2, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    pixels = torch.tensor([[[[0, 0, 0], [255, 255, 255]], [[51, 51, 51], [102, 102, 102]]]], dtype=torch.uint8)
    images = normalise(pixels, spec)
    assert images.shape == (1, 3, 2, 2)
    assert images.is_contiguous()
    expected = [[[0.0, 1.0], [0.2, 0.4]], [[-1.0, 1.0], [-0.6, -0.2]], [[-4.0, 0.0], [-3.2, -2.4]]]
    torch.testing.assert_close(images[0], torch.tensor(expected))


# -- crops, seen through images whose two channels are the coordinates of each pixel's centre (0 to 1)


def coordinates(count: int, size: int) -> Tensor:
    centres = (torch.arange(size) + 0.5) / size
    x, y = centres.expand(size, size), centres[:, None].expand(size, size)
    return torch.stack([x, y, torch.zeros(size, size)]).expand(count, -1, -1, -1)


def boxes(count: int = 400, size: int = 64, to: int = 48, min_area: float = 0.35) -> Tensor:
    """(N, 4): the left, right, top and bottom edges that the crops had; mirrored where left > right."""
    torch.manual_seed(0)
    crops = random_resized_crop_and_flip(coordinates(count, size), to, min_area)
    assert crops.shape == (count, 3, to, to)
    centre, last = to // 2, to // 2 + 1
    edges = []
    for channel, (first, second) in enumerate((((centre, centre), (centre, last)), ((centre, centre), (last, centre)))):
        step = crops[:, channel, second[0], second[1]] - crops[:, channel, first[0], first[1]]
        middle = crops[:, channel, first[0], first[1]] - step / 2  # to is even: the centre lies half a step before
        edges += [middle - step * to / 2, middle + step * to / 2]
    return torch.stack(edges, 1)


def test_crops_keep_to_the_image_and_to_their_area_and_shape() -> None:
    left, right, top, bottom = boxes().unbind(1)
    assert bool((bottom > top).all())  # never upside down
    assert float(boxes().min()) > -1e-3
    assert float(boxes().max()) < 1 + 1e-3
    width, height = (right - left).abs(), bottom - top
    area, shape = width * height, width / height
    assert 0.3 < float(area.min()) < 0.4  # a side that would exceed the image is cut, so slightly below 0.35 may come
    assert float(area.max()) > 0.9
    assert float(shape.min()) > 3 / 4 - 0.01
    assert float(shape.max()) < 4 / 3 + 0.01


def test_half_of_the_crops_are_mirrored() -> None:
    left, right, _, _ = boxes().unbind(1)
    assert 0.4 < float((left > right).float().mean()) < 0.6


def test_crops_lie_anywhere() -> None:
    left, right, top, bottom = boxes(min_area=0.2).unbind(1)
    for low, high in ((torch.minimum(left, right), torch.maximum(left, right)), (top, bottom)):
        slack = 1 - (high - low)
        place = (low / slack)[slack > 0.2]
        assert float(place.min()) < 0.1
        assert float(place.max()) > 0.9
        assert abs(float(place.mean()) - 0.5) < 0.1


def test_each_image_has_a_crop_of_its_own_that_the_seed_repeats() -> None:
    torch.manual_seed(4)
    first = random_resized_crop_and_flip(coordinates(8, 16), 16, 0.35)
    torch.manual_seed(4)
    assert torch.equal(random_resized_crop_and_flip(coordinates(8, 16), 16, 0.35), first)
    assert len({tuple(crop.flatten().tolist()) for crop in first}) == 8


def test_an_even_image_stays_even() -> None:
    crops = random_resized_crop_and_flip(torch.full((8, 3, 16, 16), 0.7), 24, 0.2)
    torch.testing.assert_close(crops, torch.full((8, 3, 24, 24), 0.7))


# -- labels


def test_smoothing_spreads_evenly_over_all_classes() -> None:
    expected = torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]])
    torch.testing.assert_close(soft_labels(torch.tensor([2, 0]), 4, 0.1), expected)
    assert torch.equal(soft_labels(torch.tensor([1]), 3, 0.0), torch.tensor([[0.0, 1.0, 0.0]]))


# -- mixing: image i is all i, so that an image's mean tells how much of each is in it


def batch() -> tuple[Tensor, Tensor]:
    return torch.arange(4.0)[:, None, None, None].expand(4, 3, 32, 32).clone(), torch.eye(4)


def test_mixing_may_be_off() -> None:
    images, targets = batch()
    mixed, mixed_targets = mix(images, targets, 0.0, 0.0)
    assert mixed is images
    assert mixed_targets is targets


def values(image: Tensor) -> set[float]:
    return set(image.flatten().tolist())


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_labels_say_how_much_of_each_image_is_in_a_mixture(mixup: float, cutmix: float) -> None:
    shares = []
    for seed in range(50):
        torch.manual_seed(seed)
        images, targets = batch()
        mixed, mixed_targets = mix(images, targets, mixup, cutmix)
        assert torch.equal(images, batch()[0])  # the batch itself is left as it was
        torch.testing.assert_close(mixed_targets.sum(1), torch.ones(4))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), mixed_targets @ torch.arange(4.0), atol=1e-3, rtol=1e-4)
        shares.append(float(mixed_targets[0, 0]))
        assert float(mixed_targets[0, 3]) == pytest.approx(1 - shares[-1], abs=1e-6)
    assert min(shares) < 0.5
    assert max(shares) > 0.8


def test_mixup_blends_and_cutmix_pastes() -> None:
    torch.manual_seed(1)
    images, targets = batch()
    assert len(values(mix(images, targets, 0.8, 0.0)[0][0])) == 1
    assert values(mix(images, targets, 0.0, 1.0)[0][0]) == {0.0, 3.0}
    assert {len(values(mix(images, targets, 0.8, 1.0)[0][0])) for _ in range(40)} == {1, 2}


def test_cutmix_pastes_one_box() -> None:
    torch.manual_seed(3)
    images, targets = batch()
    pasted = mix(images, targets, 0.0, 1.0)[0][0, 0] == 3.0
    rows, columns = pasted.any(1).nonzero().flatten(), pasted.any(0).nonzero().flatten()
    assert int(pasted.sum()) == len(rows) * len(columns) > 0
    assert math.prod(pasted.shape) > int(pasted.sum())
