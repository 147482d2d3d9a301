"""The torch engine: a dense sub-network per width in float32, the specification of every faster engine.

On a CPU each sub-network is traced. The arithmetic stays the same, but the interpreter's lock is then released once for
a whole forward pass instead of at each of its 150 operations, every one of which would wait for a busy event loop to
yield: under overload an eager batch took 8 times its idle time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from scala_model.checkpoint import Checkpoint, build_model
from scala_model.normalise import Normalise
from scala_model.subnet import DenseViT
from scala_model.width import Width
from server.types import Probabilities


class TorchEngine:
    """On ``device`` (``cpu`` or ``cuda``), with ``threads`` CPU threads."""

    name = "torch"

    def __init__(self, checkpoint: Checkpoint, *, device: str, threads: int, max_batch: int) -> None:
        self.threads, self.max_batch = threads, max_batch
        self._checkpoint, self._device = checkpoint, torch.device(device)
        self._networks: dict[Width, Callable[[torch.Tensor], torch.Tensor]] = {}

    def load(self) -> None:
        torch.set_num_threads(self.threads)
        model = build_model(self._checkpoint)
        self._networks = {width: self._network(model.subnet(width)) for width in model.config.widths}

    def _network(self, subnet: DenseViT) -> Callable[[torch.Tensor], torch.Tensor]:
        layers = [Normalise(self._checkpoint.preprocessing), subnet, nn.Softmax(-1)]
        network = nn.Sequential(*layers).to(self._device).eval()
        if self._device.type != "cpu":
            return network
        size = subnet.config.image_size
        example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
        traced: Callable[[torch.Tensor], torch.Tensor] = torch.jit.freeze(
            torch.jit.trace(network, example)  # type: ignore[no-untyped-call]
        )
        return traced

    @torch.inference_mode()
    def run(self, pixels: NDArray[np.uint8], width: Width) -> Probabilities:
        probabilities: Probabilities = self._networks[width](torch.from_numpy(pixels).to(self._device)).cpu().numpy()
        return probabilities

    def memory_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0

    def close(self) -> None:
        self._networks.clear()
