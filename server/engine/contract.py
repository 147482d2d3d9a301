"""What the server needs of an engine. ``load`` and ``run`` come from one thread, the others from the event loop."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scala_model.width import Width
from server.types import Probabilities


class Engine(Protocol):
    """Runs batches of one width. ``name`` goes into metrics; ``threads`` is how many CPU threads a batch keeps busy."""

    name: str
    threads: int
    max_batch: int

    def load(self) -> None:
        """Do all that takes long. Called once, before anything else."""

    def run(self, pixels: NDArray[np.uint8], width: Width) -> Probabilities:
        """uint8 (B, S, S, 3), B <= max_batch -> float32 (B, classes), rows that sum to 1."""

    def memory_bytes(self) -> int:
        """Device memory held, 0 when it is the process's own."""

    def close(self) -> None: ...
