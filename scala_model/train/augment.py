"""Augmentation of whole batches on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def random_resized_crop_and_flip(images: Tensor, size: int, min_area: float) -> Tensor:
    """A random box of each image, resized to ``size`` (bilinear), mirrored half of the time.

    Float images (B, 3, R, R) -> (B, 3, size, size). The box covers ``min_area`` to 1 of the area, with aspect ratios
    3/4 to 4/3 (Szegedy et al. 2015), one affine grid for the batch.
    """
    batch, device = len(images), images.device
    area = torch.empty(batch, device=device).uniform_(min_area, 1.0)
    ratio = torch.empty(batch, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    half_w, half_h = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
    shift_x = (torch.rand(batch, device=device) * 2 - 1) * (1 - half_w)
    shift_y = (torch.rand(batch, device=device) * 2 - 1) * (1 - half_h)
    mirror = torch.randint(0, 2, (batch,), device=device) * 2 - 1
    zero = torch.zeros_like(half_w)
    theta = torch.stack([half_w * mirror, zero, shift_x, zero, half_h, shift_y], dim=1).view(batch, 2, 3)
    grid = F.affine_grid(theta, [batch, 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


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
        images = images * share + others * (1 - share)
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
