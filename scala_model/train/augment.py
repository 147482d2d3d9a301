"""Augmentation of whole batches on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_resized_crop_and_flip(images: Tensor, size: int, min_area: float) -> Tensor:
    """A random box of each image, resized to ``size``, mirrored half of the time.

    Float images (B, 3, R, R) -> (B, 3, size, size). The box covers ``min_area`` to 1 of the area, with aspect ratios
    3/4 to 4/3 (Szegedy et al. 2015). Bicubic with antialiasing, like the preprocessing of evaluation and serving, so
    values may leave the range of the input by a little.
    """
    batch, source, device = len(images), images.shape[-1], images.device
    area = torch.empty(batch, device=device).uniform_(min_area, 1.0)
    ratio = torch.empty(batch, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1.0) * source, (area / ratio).sqrt().clamp(max=1.0) * source
    left = torch.rand(batch, device=device) * (source - width)
    top = torch.rand(batch, device=device) * (source - height)
    mirror = torch.randint(0, 2, (batch,), device=device)
    columns = resize_matrix(left + mirror * width, (1 - 2 * mirror) * width, source, size)
    rows = resize_matrix(top, height, source, size)
    return torch.einsum("byr,bcrs,bxs->bcyx", rows, images, columns)


def resize_matrix(start: Tensor, length: Tensor, num_in: int, num_out: int) -> Tensor:
    """(B, num_out, num_in): the weights with which ``num_in`` pixels in a row make up ``num_out`` that span a part.

    The part starts at ``start`` (B, in pixels) and is ``length`` (B) long; it is mirrored where that is negative. The
    filter is Pillow's: the cubic convolution of Keys 1981 (a = -0.5), stretched where the row shrinks.
    """
    scale = length[:, None, None] / num_out
    centres = start[:, None, None] + (torch.arange(num_out, device=start.device)[:, None] + 0.5) * scale
    pixels = torch.arange(num_in, device=start.device) + 0.5
    x = ((pixels - centres) / scale.abs().clamp(min=1.0)).abs_().clamp_(max=2.0)
    weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
    return weights / weights.sum(2, keepdim=True)


def random_erasing(images: Tensor, probability: float) -> Tensor:
    """Noise in a random box of some images (Zhong et al. 2020, arXiv 1708.04896), each with ``probability``.

    Normalised images (B, 3, S, S): every value in the box is drawn from N(0, 1), as in DeiT's recipe. A box covers 2 to
    33 % of the area with aspect ratios 0.3 to 1 / 0.3; the rare side that would exceed the image is cut.
    """
    batch, size, device = len(images), images.shape[-1], images.device
    area = torch.empty(batch, device=device).uniform_(0.02, 1 / 3)
    ratio = torch.empty(batch, device=device).uniform_(math.log(0.3), -math.log(0.3)).exp()
    erased = torch.rand(batch, device=device) < probability
    columns = _random_spans((area * ratio).sqrt(), size)
    rows = _random_spans((area / ratio).sqrt(), size)
    box = (erased[:, None, None] & rows[:, :, None] & columns[:, None, :])[:, None]
    return torch.where(box, torch.randn_like(images), images)


def _random_spans(share: Tensor, size: int) -> Tensor:
    """(B, size): true on a run of ``share`` (B) of ``size`` pixels, anywhere."""
    length = (share * size).round().clamp(max=size)
    start = (torch.rand_like(share) * (size - length + 1)).floor()[:, None]
    pixels = torch.arange(size, device=share.device)
    return (pixels >= start) & (pixels < start + length[:, None])


def soft_labels(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Class indices (B) -> label-smoothed distributions (B, classes)."""
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    return targets.scatter_add_(1, labels[:, None], torch.full_like(targets[:, :1], 1.0 - smoothing))


def mix(images: Tensor, targets: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019), drawn once for the batch; 0 switches either off."""
    choices = [kind for kind, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha > 0]
    if not choices:
        return images, targets
    kind = choices[int(torch.randint(len(choices), ()))]
    alpha = mixup if kind == "mixup" else cutmix
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    others, other_targets = images.flip(0), targets.flip(0)
    if kind == "mixup":
        images = others.lerp(images, share)
    else:
        images, share = _cut(images, others, share)
    return images, targets * share + other_targets * (1 - share)


def _cut(images: Tensor, others: Tensor, share: float) -> tuple[Tensor, float]:
    """Paste a random box of ``others``; returns the share of the area that stayed."""
    size = images.shape[-1]
    half = size * math.sqrt(1 - share) / 2
    centre_y, centre_x = (torch.rand(2) * size).tolist()
    top, bottom = max(0, round(centre_y - half)), min(size, round(centre_y + half))
    left, right = max(0, round(centre_x - half)), min(size, round(centre_x + half))
    images = images.clone()
    images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return images, 1 - (bottom - top) * (right - left) / size**2
