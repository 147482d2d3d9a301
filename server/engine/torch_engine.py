"""The torch engine: the network as it is written down, float32, eager. The specification of every faster engine.

It serves where nothing faster is installed. On a busy CPU that is slow beyond its arithmetic: each of a forward pass's
150 operations gives up the interpreter's lock and waits until the event loop yields it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from scala_model.checkpoint import Checkpoint, build_model
from scala_model.normalise import Normalise
from scala_model.width import Width
from server.engine.device_errors import device_errors
from server.machine import cpu_name
from server.types import Probabilities


class TorchEngine:
    """On ``device`` (``cpu`` or ``cuda``), with ``threads`` CPU threads."""

    name = f"torch {torch.__version__}"

    def __init__(self, checkpoint: Checkpoint, *, device: str, threads: int, max_batch: int) -> None:
        self.threads, self.max_batch = threads, max_batch
        self.device = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
        self._place = torch.device(device)
        self._normalise = Normalise(checkpoint.preprocessing).to(self._place)
        self._model = build_model(checkpoint).to(self._place)
        torch.set_num_threads(threads)

    def load(self, width: Width, batch: int) -> None:
        """Nothing to do: every width is a slice of the one network."""

    @torch.inference_mode()
    def run(self, pixels: NDArray[np.uint8], width: Width) -> Probabilities:
        with device_errors():
            logits = self._model(self._normalise(torch.from_numpy(pixels).to(self._place)), width)
            probabilities: Probabilities = logits.softmax(-1).cpu().numpy()
        return probabilities

    def memory_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._place) if self._place.type == "cuda" else 0

    def close(self) -> None: ...
