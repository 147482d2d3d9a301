"""Augmentation of whole batches: what each operation may and may not do to pixels and labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from scala_model.normalise import normalise
from scala_model.preprocess import Preprocessing
from scala_model.train.augment import mix, random_erasing, random_resized_crop_and_flip, resize_matrix, soft_labels


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
    first, last = to // 4, to - 1 - to // 4  # far from the borders and from each other
    edges = []
    for lines in (crops[:, 0, to // 2, :], crops[:, 1, :, to // 2]):
        step, middle = (lines[:, last] - lines[:, first]) / (last - first), (lines[:, last] + lines[:, first]) / 2
        edges += [middle - step * to / 2, middle + step * to / 2]
    return torch.stack(edges, 1)


def test_crops_keep_to_the_image_and_to_their_area_and_shape() -> None:
    edges = boxes()
    left, right, top, bottom = edges.unbind(1)
    assert bool((bottom > top).all())  # never upside down
    assert float(edges.min()) > -1e-3
    assert float(edges.max()) < 1 + 1e-3
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


@pytest.mark.parametrize(("box", "to"), [((0, 0, 64, 64), 48), ((3.3, 10.6, 49.1, 50.2), 48), ((20.5, 1, 61, 40), 64)])
def test_crops_are_resized_like_pillow_resizes_for_evaluation(box: tuple[float, ...], to: int) -> None:
    pixels = np.random.default_rng(5).random((64, 64), np.float32)
    left, top, right, bottom = box
    expected = Image.fromarray(pixels).resize((to, to), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    columns = resize_matrix(torch.tensor([left]), torch.tensor([right - left]), 64, to)[0]
    rows = resize_matrix(torch.tensor([top]), torch.tensor([bottom - top]), 64, to)[0]
    resized = rows @ torch.from_numpy(pixels) @ columns.T
    torch.testing.assert_close(resized, torch.from_numpy(np.array(expected)), atol=1e-4, rtol=0)


def test_a_negative_length_mirrors() -> None:
    forth = resize_matrix(torch.tensor([3.0]), torch.tensor([10.0]), 16, 8)
    back = resize_matrix(torch.tensor([13.0]), torch.tensor([-10.0]), 16, 8)
    torch.testing.assert_close(back, forth.flip(1))


# -- erasing


def erased(count: int, size: int, probability: float = 1.0) -> Tensor:
    """What erasing made of images that are 7 everywhere: the noise, NaN where the images stayed."""
    torch.manual_seed(0)
    images = random_erasing(torch.full((count, 3, size, size), 7.0), probability)
    return torch.where(images == 7.0, torch.nan, images)


def test_erases_one_box_of_the_documented_area_and_shape() -> None:
    changed = ~erased(500, 64).isnan()
    assert torch.equal(changed.all(1), changed.any(1))  # all channels or none
    height, width = changed[:, 0].any(2).sum(1), changed[:, 0].any(1).sum(1)
    area, shape = height * width, width / height
    assert torch.equal(changed[:, 0].sum((1, 2)), area)
    assert 0.015 < float(area.min()) / 64**2 < 0.03  # a side is rounded to whole pixels
    assert 0.32 < float(area.max()) / 64**2 < 0.35
    assert float(area.float().mean()) / 64**2 == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    assert 0.27 < float(shape.min()) < 0.35
    assert 2.9 < float(shape.max()) < 3.7
    assert float(shape.log().mean()) == pytest.approx(0, abs=0.1)


def test_erases_anywhere() -> None:
    share = (~erased(2000, 16).isnan())[:, 0].float().mean(0)
    assert float(share.min()) > 0.005  # corners lie in few boxes
    torch.testing.assert_close(share, share.flip(0), atol=0.06, rtol=0)
    torch.testing.assert_close(share, share.flip(1), atol=0.06, rtol=0)


def test_erases_a_share_of_the_images() -> None:
    images = (~erased(2000, 8, 0.25).isnan()).flatten(1).any(1)
    assert float(images.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert not bool((~erased(50, 8, 0.0).isnan()).any())


def test_erased_pixels_are_independent_normal_noise() -> None:
    noise = erased(200, 32)
    values = noise[~noise.isnan()]
    assert float(values.mean()) == pytest.approx(0, abs=0.02)
    assert float(values.std()) == pytest.approx(1, abs=0.02)
    assert len(set(values.tolist())) > 0.99 * len(values)


def test_erasing_repeats_with_the_seed_and_leaves_the_batch_itself() -> None:
    images = torch.zeros(8, 3, 16, 16)
    torch.manual_seed(4)
    first = random_erasing(images, 0.5)
    torch.manual_seed(4)
    assert torch.equal(random_erasing(images, 0.5), first)
    assert not bool(images.any())


def test_nothing_but_numbers_drawn_on_the_host_decides_what_runs() -> None:
    """Tensors of the meta device have no values: whoever asked for one, and on a GPU waited for it, would raise."""
    images = torch.empty(8, 3, 64, 64, device="meta")
    crops = random_resized_crop_and_flip(images, 48, 0.35)
    mixed, targets = mix(random_erasing(crops, 0.25), torch.empty(8, 10, device="meta"), 0.8, 1.0)
    assert (mixed.shape, targets.shape) == ((8, 3, 48, 48), (8, 10))


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


def test_half_of_the_batches_are_blended_and_half_are_pasted() -> None:
    torch.manual_seed(2)
    pasted = [values(mix(*batch(), 1.0, 1.0)[0][0]) <= {0.0, 3.0} for _ in range(300)]
    assert sum(pasted) / len(pasted) == pytest.approx(0.5, abs=0.08)


def test_cutmix_pastes_one_box() -> None:
    torch.manual_seed(3)
    images, targets = batch()
    pasted = mix(images, targets, 0.0, 1.0)[0][0, 0] == 3.0
    rows, columns = pasted.any(1).nonzero().flatten(), pasted.any(0).nonzero().flatten()
    assert int(pasted.sum()) == len(rows) * len(columns) > 0
    assert math.prod(pasted.shape) > int(pasted.sum())
