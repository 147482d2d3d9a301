"""RandAugment, held against Pillow: what each operation does to pixels at a magnitude, and how often it is drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from scala_model.train.rand_augment import OPERATIONS, rand_augment

SIZE = 32
FILL = (124, 116, 104)


def pictures() -> list[Image.Image]:
    """Noise, dim noise, smooth colours, two levels, one level."""
    random = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    arrays = [
        random.integers(0, 256, (SIZE, SIZE, 3)),
        random.integers(60, 181, (SIZE, SIZE, 3)),
        np.stack([x * 6 + 20, y * 7, (x + y) * 3 + 30], 2),
        random.integers(0, 2, (SIZE, SIZE, 3)) * 37 + 100,
        np.full((SIZE, SIZE, 3), (200, 90, 10)),
    ]
    return [Image.fromarray(array.astype(np.uint8)) for array in arrays]


def to_levels(images: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float()


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL)


def rotated(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=FILL)


def added(image: Image.Image, amount: int) -> Image.Image:
    return image.point([min(255, level + amount) if level < 128 else level for level in range(256)] * 3)


def bits_kept(image: Image.Image, bits: int) -> Image.Image:
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


# Each operation at a magnitude of 10 x |m|, by what timm documents of it; m < 0 where timm would have negated.
Reference = Callable[[Image.Image, float], Image.Image]
EXACT: dict[str, Reference] = {
    "Equalize": lambda image, m: ImageOps.equalize(image),
    "Invert": lambda image, m: ImageOps.invert(image),
    "PosterizeIncreasing": lambda image, m: bits_kept(image, 4 - int(abs(m) * 4)),
    "SolarizeIncreasing": lambda image, m: ImageOps.solarize(image, 256 - int(abs(m) * 256)),
    "SolarizeAdd": lambda image, m: added(image, int(abs(m) * 110)),
}
ROUNDED: dict[str, Reference] = {
    "AutoContrast": lambda image, m: ImageOps.autocontrast(image),
    "ColorIncreasing": lambda image, m: ImageEnhance.Color(image).enhance(max(0.1, 1 + 0.9 * m)),
    "ContrastIncreasing": lambda image, m: ImageEnhance.Contrast(image).enhance(max(0.1, 1 + 0.9 * m)),
    "BrightnessIncreasing": lambda image, m: ImageEnhance.Brightness(image).enhance(max(0.1, 1 + 0.9 * m)),
    "SharpnessIncreasing": lambda image, m: ImageEnhance.Sharpness(image).enhance(max(0.1, 1 + 0.9 * m)),
}
GEOMETRIC: dict[str, Reference] = {
    "Rotate": lambda image, m: rotated(image, 30 * m),
    "ShearX": lambda image, m: affine(image, 1, 0.3 * m, 0, 0, 1, 0),
    "ShearY": lambda image, m: affine(image, 1, 0, 0, 0.3 * m, 1, 0),
    "TranslateXRel": lambda image, m: affine(image, 1, 0, 0.45 * m * SIZE, 0, 1, 0),
    "TranslateYRel": lambda image, m: affine(image, 1, 0, 0, 0, 1, 0.45 * m * SIZE),
}
STRENGTHS = (0.0, 0.1, -0.1, 0.5, 0.9, -0.9, 1.0, -1.0)


def both(name: str, reference: Reference, strength: float) -> tuple[Tensor, Tensor]:
    levels = to_levels(pictures())
    ours = OPERATIONS[name](levels, torch.full((len(levels),), strength))
    return ours, to_levels([reference(picture, strength) for picture in pictures()])


def test_the_operations_are_the_fifteen_of_the_increasing_set() -> None:
    assert set(OPERATIONS) == {*EXACT, *ROUNDED, *GEOMETRIC}
    assert len(OPERATIONS) == 15


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", EXACT)
def test_operations_on_integers_are_pillows(name: str, strength: float) -> None:
    ours, expected = both(name, EXACT[name], strength)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", ROUNDED)
def test_operations_with_fractions_are_pillows_but_for_a_few_roundings(name: str, strength: float) -> None:
    ours, expected = both(name, ROUNDED[name], strength)
    torch.testing.assert_close(ours, expected, atol=1, rtol=0)
    assert float((ours != expected).float().mean()) < 0.01


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometry_is_pillows_but_for_the_edge(name: str, strength: float) -> None:
    """At the image's edge ours fades to the fill colour within a pixel, where Pillow cuts."""
    ours, expected = both(name, GEOMETRIC[name], strength)
    mask = GEOMETRIC[name](Image.new("RGB", (SIZE, SIZE), (255, 255, 255)), strength)
    inside = torch.from_numpy(np.asarray(mask)[:, :, 0] == 255)
    near_edge = torch.nn.functional.max_pool2d((~inside).float()[None, None], 3, 1, 1)[0, 0] > 0
    far_outside = torch.nn.functional.max_pool2d(inside.float()[None, None], 3, 1, 1)[0, 0] == 0
    inner = ~near_edge
    inner[[0, -1]] = inner[:, [0, -1]] = False
    assert int(inner.sum()) > SIZE**2 / 5
    torch.testing.assert_close(ours[..., inner], expected[..., inner], atol=1.5, rtol=0)
    torch.testing.assert_close(ours[..., far_outside], expected[..., far_outside], atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [3, 17, 48])
def test_equalizes_images_of_any_size_as_pillow_does(size: int) -> None:
    """Small ones too, where a step of one pixel makes the table run over 255."""
    random = np.random.default_rng(size)
    images = [Image.fromarray(random.integers(0, top, (size, size, 3)).astype(np.uint8)) for top in (2, 20, 256)]
    images.append(Image.fromarray((random.random((size, size, 3)) ** 3 * 255).astype(np.uint8)))
    ours = OPERATIONS["Equalize"](to_levels(images), torch.zeros(len(images)))
    assert torch.equal(ours, to_levels([ImageOps.equalize(image) for image in images]))


def test_each_image_has_its_own_strength() -> None:
    levels = to_levels(pictures()[:1] * 3)
    strength = torch.tensor([0.9, -0.9, 0.1])
    for name, operation in OPERATIONS.items():
        together = operation(levels, strength)
        apart = torch.cat([operation(levels[i : i + 1], strength[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(together, apart, msg=name)


# -- what is drawn


def dim_noise(count: int, size: int = 8) -> Tensor:
    """Images that every operation changes."""
    return (torch.randint(60, 180, (count, 3, size, size), generator=torch.Generator().manual_seed(1))) / 255


@pytest.mark.parametrize(("layers", "share"), [(0, 0.0), (1, 0.5), (2, 0.75)])
def test_each_layer_changes_half_of_the_images(layers: int, share: float) -> None:
    images, changed = dim_noise(64), []
    for seed in range(20):
        torch.manual_seed(seed)
        difference = (rand_augment(images, layers, 9.0) - images).abs()
        changed.append(float((difference.amax((1, 2, 3)) > 1e-3).float().mean()))
    assert sum(changed) / len(changed) == pytest.approx(share, abs=0.07)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor]]:
    """Every operation that runs, by its name and strengths, in order."""
    calls: list[tuple[str, Tensor]] = []

    def record(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        def operation(levels: Tensor, strength: Tensor) -> Tensor:
            calls.append((name, strength))
            return levels

        return operation

    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, record(name))
    return calls


def test_operations_are_equally_likely_and_change_from_chunk_to_chunk(drawn: list[tuple[str, Tensor]]) -> None:
    for seed in range(60):
        torch.manual_seed(seed)
        rand_augment(dim_noise(64), 2, 9.0)
    names = [name for name, _ in drawn]
    assert {len(strength) for _, strength in drawn} == {2}  # 64 images in 32 chunks
    assert len(names) == pytest.approx(60 * 2 * 32 / 2, rel=0.1)
    for name in OPERATIONS:
        assert names.count(name) / len(names) == pytest.approx(1 / 15, abs=0.02), name


@pytest.mark.parametrize("magnitude", [1.0, 9.0])
def test_strengths_scatter_about_the_magnitude_and_are_signed(
    drawn: list[tuple[str, Tensor]], magnitude: float
) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        rand_augment(dim_noise(512, 4), 2, magnitude)
    strengths = torch.cat([strength for _, strength in drawn])
    assert float((strengths > 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert 0 <= float(strengths.abs().min()) <= float(strengths.abs().max()) <= 1
    assert float(strengths.abs().mean()) == pytest.approx(magnitude / 10, abs=0.01)
    assert float(strengths.abs().std()) == pytest.approx(0.05, abs=0.01)
    assert len(set(strengths.abs().tolist())) > 0.8 * len(strengths)  # the rest are cut at 0 or 10


def test_a_batch_that_does_not_fill_all_chunks_is_augmented_too(drawn: list[tuple[str, Tensor]]) -> None:
    torch.manual_seed(0)
    images = dim_noise(37)
    torch.testing.assert_close(rand_augment(images, 2, 9.0), images)  # the recorder changes nothing
    assert {len(strength) for _, strength in drawn} <= {1, 2}


# -- the batch


def test_images_stay_in_range_and_the_batch_itself_as_it_was() -> None:
    images = to_levels(pictures() * 13) / 255
    before = images.clone()
    for seed in range(5):
        torch.manual_seed(seed)
        augmented = rand_augment(images, 3, 10.0)
        assert augmented.shape == images.shape
        assert 0 <= float(augmented.min()) < float(augmented.max()) <= 1
        torch.testing.assert_close(augmented * 255, (augmented * 255).round(), atol=1e-4, rtol=0)
    assert torch.equal(images, before)


def test_overshoot_of_a_bicubic_crop_is_clipped() -> None:
    images = torch.tensor([-0.2, 0.5004, 1.2]).view(1, 1, 3, 1).expand(1, 3, 3, 3)
    expected = (torch.tensor([0.0, 128.0, 255.0]) / 255).view(1, 1, 3, 1).expand(1, 3, 3, 3)
    torch.testing.assert_close(rand_augment(images, 0, 9.0), expected)


def test_repeats_with_the_seed() -> None:
    images = dim_noise(64)
    torch.manual_seed(3)
    first = rand_augment(images, 2, 9.0)
    torch.manual_seed(3)
    assert torch.equal(rand_augment(images, 2, 9.0), first)
    assert not torch.equal(rand_augment(images, 2, 9.0), first)


def test_no_operation_asks_a_tensor_for_its_values() -> None:
    """Tensors of the meta device have none: whoever asked for one, and on a GPU waited for it, would raise."""
    levels, strength = torch.empty(4, 3, 8, 8, device="meta"), torch.empty(4, device="meta")
    for operation in OPERATIONS.values():
        assert operation(levels, strength).shape == levels.shape
    assert rand_augment(levels, 2, 9.0).shape == levels.shape


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_operations_on_a_gpu_give_the_same_without_waiting_for_it() -> None:
    levels = to_levels(pictures())
    strength = torch.linspace(-1, 1, len(levels))
    on_gpu = levels.cuda(), strength.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rand_augment(on_gpu[0] / 255, 2, 9.0)
        results = {name: operation(*on_gpu) for name, operation in OPERATIONS.items()}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, result in results.items():
        torch.testing.assert_close(result.cpu(), OPERATIONS[name](levels, strength), atol=1.0, rtol=0, msg=name)


@pytest.mark.parametrize("magnitude", [-1.0, 10.5, float("nan")])
def test_refuses_a_magnitude_off_the_scale(magnitude: float) -> None:
    with pytest.raises(ValueError, match="give a number from 0 to 10"):
        rand_augment(dim_noise(2), 2, magnitude)
