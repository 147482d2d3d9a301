"""From pixels to what a network reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scala_model.preprocess import Preprocessing


class Normalise(nn.Module):
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S) with the mean and deviation of a specification."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: Preprocessing) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(spec.mean) * 255)
        self.register_buffer("std", torch.tensor(spec.std) * 255)

    def forward(self, pixels: Tensor) -> Tensor:
        return ((pixels - self.mean) / self.std).permute(0, 3, 1, 2).contiguous()


def normalise(pixels: Tensor, spec: Preprocessing) -> Tensor:
    """The same as a function, on the device of ``pixels``."""
    normalised: Tensor = Normalise(spec).to(pixels.device)(pixels)
    return normalised


class Standardise(nn.Module):
    """Float images (B, 3, S, S) in 0..1 -> with the mean and deviation of a specification; ``undo`` leads back."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: Preprocessing) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(spec.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(spec.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def undo(self, images: Tensor) -> Tensor:
        return images * self.std + self.mean
