"""What the server needs of an engine.

``load`` comes from threads of its own, and may run beside another ``load`` and beside ``run``. ``run`` comes from one
thread, and only asks for what is loaded. The rest is called from the event loop.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scala_model.width import Width
from server.types import Probabilities


class DeviceOutOfMemory(Exception):
    """The device has no memory for this batch now; smaller or narrower ones may still run."""


class DeviceLost(Exception):
    """The device will not answer again in this process: only a restart helps."""


class Engine(Protocol):
    """Runs batches of one width.

    ``name`` has the version in it, ``device`` is the hardware's model: measured latencies are kept for the two.
    ``threads`` is how many CPU threads a batch keeps busy.
    """

    name: str
    device: str
    threads: int
    max_batch: int

    def load(self, width: Width, batch: int) -> None:
        """Do all that takes long for batches of up to ``batch`` images at a width: first for one, later for more.

        Raises whatever the device has to say.
        """

    def run(self, pixels: NDArray[np.uint8], width: Width) -> Probabilities:
        """uint8 (B, S, S, 3), B <= max_batch -> float32 (B, classes), rows that sum to 1.

        A row depends on its image and the width alone. The same batch gives the same bits again; among other images, or
        in another place, a row may differ by rounding: on a CPU by 1e-5 at most (OpenVINO differed by nothing, torch by
        5e-7, on every batch tried).

        Raises DeviceOutOfMemory or DeviceLost; anything else is the fault of this batch, and so is what is returned but
        no probabilities. A width that is found unusable may raise DeviceOutOfMemory until it is loaded again.
        """

    def memory_bytes(self) -> int:
        """Device memory held, 0 when it is the process's own."""

    def close(self) -> None: ...
