"""The torch engine: a dense sub-network per width, run eagerly in float32. The specification of every faster engine."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from scala_model.checkpoint import Checkpoint, build_model
from scala_model.subnet import DenseViT
from scala_model.width import Width
from server.types import Probabilities


class TorchEngine:
    """On ``device`` (``cpu`` or ``cuda``), with ``threads`` CPU threads."""

    name = "torch"

    def __init__(self, checkpoint: Checkpoint, *, device: str, threads: int, max_batch: int) -> None:
        self.threads, self.max_batch = threads, max_batch
        self._checkpoint, self._device = checkpoint, torch.device(device)
        self._subnets: dict[Width, DenseViT] = {}

    def load(self) -> None:
        torch.set_num_threads(self.threads)
        spec = self._checkpoint.preprocessing
        self._mean = torch.tensor(spec.mean, device=self._device) * 255
        self._std = torch.tensor(spec.std, device=self._device) * 255
        model = build_model(self._checkpoint)
        self._subnets = {w: model.subnet(w).to(self._device) for w in model.config.widths}

    @torch.inference_mode()
    def run(self, pixels: NDArray[np.uint8], width: Width) -> Probabilities:
        images = ((torch.from_numpy(pixels).to(self._device) - self._mean) / self._std).permute(0, 3, 1, 2).contiguous()
        probabilities: Probabilities = self._subnets[width](images).softmax(-1).cpu().numpy()
        return probabilities

    def memory_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0

    def close(self) -> None:
        self._subnets.clear()
