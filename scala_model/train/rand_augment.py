"""RandAugment (Cubuk et al. 2020, arXiv 1909.13719) of whole batches on the device.

Operations, magnitudes and probabilities are those of the recipe string ``rand-m<magnitude>-mstd0.5-inc1`` of timm, with
which DeiT was trained: each of ``layers`` times, one of fifteen operations is drawn for an image and applied half of
the time, at a magnitude of its own. Ours differs in two ways. A chunk of 1/32 of the batch (which is in random order)
shares which operation, if any, so that each runs on a tensor of fixed shape; an image's chances are the same. And
images are warped bilinearly, where DeiT's recipe is bicubic.

Nothing here makes the host wait for the device: what decides which kernels run is drawn on the host, all else there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Operation = Callable[[Tensor, Tensor], Tensor]  # of levels (B, 3, S, S) and strengths (B)

NUM_CHUNKS = 32
APPLY_PROBABILITY = 0.5
MAX_MAGNITUDE = 10.0
MAGNITUDE_STD = 0.5
# ImageNet's mean colour, timm's choice too: nearly 0 once normalised, where a reflection would show things twice.
FILL_LEVELS = (124, 116, 104)


def rand_augment(images: Tensor, layers: int, magnitude: float) -> Tensor:
    """``layers`` random operations on each image, at about ``magnitude`` on a scale of 0 to 10.

    Images (B, 3, S, S) in 0..1 -> the same shape and range, rounded to 8 bits on the way in; values outside, as bicubic
    crops have, are clipped. Raises ``ValueError`` for a magnitude outside 0..10.
    """
    if not 0 <= magnitude <= MAX_MAGNITUDE:
        raise ValueError(f"RandAugment's magnitude is {magnitude}: give a number from 0 to {MAX_MAGNITUDE:g}")
    levels = (images * 255).round_().clamp_(0, 255)
    for _ in range(layers):
        levels = _one_layer(levels, magnitude)
    return levels.div_(255)


def _one_layer(levels: Tensor, magnitude: float) -> Tensor:
    noise = torch.randn(len(levels), device=levels.device)
    sign = torch.randint(0, 2, (len(levels),), device=levels.device) * 2 - 1
    strength = (magnitude + MAGNITUDE_STD * noise).clamp(0, MAX_MAGNITUDE) / MAX_MAGNITUDE * sign
    chunks = list(zip(levels.chunk(NUM_CHUNKS), strength.chunk(NUM_CHUNKS), strict=True))
    return torch.cat([operation(*chunk) for operation, chunk in zip(_draw(len(chunks)), chunks, strict=True)])


def _draw(count: int) -> list[Operation]:
    """An operation for each chunk or, half of the time, one that does nothing."""
    operations = list(OPERATIONS.values())
    drawn = torch.randint(len(operations), (count,)).tolist()
    applied = (torch.rand(count) < APPLY_PROBABILITY).tolist()
    return [operations[index] if apply else _leave for index, apply in zip(drawn, applied, strict=True)]


# -- the operations: whole levels 0..255 (B, 3, S, S), and a parameter for each image (B), to whole levels, as in Pillow


def autocontrast(levels: Tensor) -> Tensor:
    """Stretch each channel to 0..255; one of a single level stays."""
    low, high = levels.amin((2, 3), keepdim=True), levels.amax((2, 3), keepdim=True)
    stretched = ((levels - low) * 255 / (high - low).clamp(min=1)).floor()
    return torch.where(high > low, stretched, levels)


def equalize(levels: Tensor) -> Tensor:
    """Use each channel's levels equally often, in Pillow's steps: 1/255 of the pixels, the brightest not counted."""
    index = levels.flatten(2).long()
    counts = index.new_zeros(*index.shape[:2], 256).scatter_add_(2, index, torch.ones_like(index))
    brightest = counts.gather(2, index.amax(2, keepdim=True))
    step = (index.shape[2] - brightest) // 255
    darker = counts.cumsum(2) - counts
    table = ((darker + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=levels.device))
    return table.gather(2, index).view(levels.shape).to(levels.dtype)


def posterize(levels: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper ``bits`` (0 to 8) of 8."""
    step = _each(2.0 ** (8 - bits))
    return (levels / step).floor() * step


def solarize(levels: Tensor, threshold: Tensor) -> Tensor:
    """Invert what is not below ``threshold``."""
    return torch.where(levels < _each(threshold), levels, 255 - levels)


def solarize_add(levels: Tensor, amount: Tensor) -> Tensor:
    """Brighten the darker half of all levels by ``amount`` of them."""
    return torch.where(levels < 128, (levels + _each(amount)).clamp(max=255), levels)


def color(levels: Tensor, factor: Tensor) -> Tensor:
    """From grey (0) over the image itself (1) to more colourful."""
    return _blend(_grey(levels), levels, factor)


def contrast(levels: Tensor, factor: Tensor) -> Tensor:
    """From an even grey, the image's mean (0), over the image itself (1) to more contrast."""
    return _blend(_grey(levels).mean((2, 3), keepdim=True), levels, factor)


def brightness(levels: Tensor, factor: Tensor) -> Tensor:
    """From black (0) over the image itself (1) to brighter."""
    return _blend(torch.zeros_like(levels), levels, factor)


def sharpness(levels: Tensor, factor: Tensor) -> Tensor:
    """From Pillow's ``SMOOTH`` (0) over the image itself (1) to sharper; the outermost pixels stay."""
    rows = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
    nine = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = levels.clone()
    smooth[:, :, 1:-1, 1:-1] = (nine + 4 * levels[:, :, 1:-1, 1:-1]) / 13  # a kernel of eight 1s around a 5
    return _blend(smooth, levels, factor)


def rotate(levels: Tensor, degrees: Tensor) -> Tensor:
    """Counter-clockwise about the centre."""
    x, y = _centres(levels)
    angle = degrees.deg2rad()[:, None, None]
    return _warp(levels, angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y)


def shear_x(levels: Tensor, factor: Tensor) -> Tensor:
    """Each row ``factor`` pixels further left than the one above; the upper edge stays."""
    x, y = _centres(levels)
    return _warp(levels, x + factor[:, None, None] * (y + 1), y)


def shear_y(levels: Tensor, factor: Tensor) -> Tensor:
    """Each column ``factor`` pixels higher than the one to its left; the left edge stays."""
    x, y = _centres(levels)
    return _warp(levels, x, y + factor[:, None, None] * (x + 1))


def translate_x(levels: Tensor, share: Tensor) -> Tensor:
    """To the left by a ``share`` of the image's side."""
    x, y = _centres(levels)
    return _warp(levels, x + 2 * share[:, None, None], y)


def translate_y(levels: Tensor, share: Tensor) -> Tensor:
    """Upwards by a ``share`` of the image's side."""
    x, y = _centres(levels)
    return _warp(levels, x, y + 2 * share[:, None, None])


def _centres(levels: Tensor) -> tuple[Tensor, Tensor]:
    """The x (1, S) and y (S, 1) of each pixel's centre; the image covers -1..1."""
    size = levels.shape[-1]
    centres = (torch.arange(size, device=levels.device) * 2 + 1) / size - 1
    return centres[None, :], centres[:, None]


def _warp(levels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """What was at x and y, broadcast to (B, S, S), bilinearly; ``FILL_LEVELS`` outside the image."""
    shape = len(levels), *levels.shape[2:]
    grid = torch.stack([x.expand(shape), y.expand(shape)], 3)
    # Made there number by number: copying a constant to a device would wait for all that it has to do.
    fill = torch.stack([levels.new_full((1, 1), level) for level in FILL_LEVELS])
    return F.grid_sample(levels - fill, grid, align_corners=False).add(fill).round()


def _blend(other: Tensor, levels: Tensor, factor: Tensor) -> Tensor:
    other = other.round()
    return (other + (levels - other) * _each(factor)).clamp(0, 255).floor()


def _grey(levels: Tensor) -> Tensor:
    """ITU-R 601 luma (B, 1, S, S)."""
    red, green, blue = levels.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


def _leave(levels: Tensor, _: Tensor) -> Tensor:
    return levels


def _each(parameter: Tensor) -> Tensor:
    return parameter.view(-1, 1, 1, 1)


def _factor(strength: Tensor) -> Tensor:
    """0.1 to 1.9."""
    return 1 + 0.9 * strength


# Each by timm's name. The strength (B) is magnitude / 10, negated half of the time: what has no direction ignores that.
OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda levels, _: autocontrast(levels),
    "Equalize": lambda levels, _: equalize(levels),
    "Invert": lambda levels, _: 255 - levels,
    "Rotate": lambda levels, strength: rotate(levels, 30 * strength),
    "PosterizeIncreasing": lambda levels, strength: posterize(levels, 4 - (4 * strength.abs()).floor()),
    "SolarizeIncreasing": lambda levels, strength: solarize(levels, 256 - (256 * strength.abs()).floor()),
    "SolarizeAdd": lambda levels, strength: solarize_add(levels, (110 * strength.abs()).floor()),
    "ColorIncreasing": lambda levels, strength: color(levels, _factor(strength)),
    "ContrastIncreasing": lambda levels, strength: contrast(levels, _factor(strength)),
    "BrightnessIncreasing": lambda levels, strength: brightness(levels, _factor(strength)),
    "SharpnessIncreasing": lambda levels, strength: sharpness(levels, _factor(strength)),
    "ShearX": lambda levels, strength: shear_x(levels, 0.3 * strength),
    "ShearY": lambda levels, strength: shear_y(levels, 0.3 * strength),
    "TranslateXRel": lambda levels, strength: translate_x(levels, 0.45 * strength),
    "TranslateYRel": lambda levels, strength: translate_y(levels, 0.45 * strength),
}
