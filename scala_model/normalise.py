"""From pixels to what a network reads."""

from __future__ import annotations

import torch
from torch import Tensor

from scala_model.preprocess import Preprocessing


def normalise(pixels: Tensor, spec: Preprocessing) -> Tensor:
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S) with the mean and deviation of the specification."""
    mean = torch.tensor(spec.mean, device=pixels.device) * 255
    std = torch.tensor(spec.std, device=pixels.device) * 255
    return ((pixels - mean) / std).permute(0, 3, 1, 2).contiguous()
