"""An engine without a network: the class of an image is its first byte."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from scala_model.width import Width
from server.types import Probabilities
from tests.unit.virtual_time import Clock


class FakeEngine:
    """A batch takes ``seconds(width, images)`` of the clock; whatever that raises, the engine raises."""

    name, device = "fake", "none"
    threads = 1

    def __init__(self, clock: Clock, *, max_batch: int = 4, num_classes: int = 200) -> None:
        self.clock, self.max_batch, self.num_classes = clock, max_batch, num_classes
        self.seconds: Callable[[Width, list[int]], float] = usual_seconds
        self.batches: list[tuple[Width, list[int]]] = []
        self.loaded: list[tuple[Width, int]] = []

    @property
    def served(self) -> list[tuple[Width, list[int]]]:
        """The batches that hold more than the black images of the warm-up."""
        return [(width, images) for width, images in self.batches if any(images)]

    def load(self, width: Width, batch: int) -> None:
        self.loaded.append((width, batch))

    def run(self, pixels: NDArray[np.uint8], width: Width) -> Probabilities:
        images = [int(image) for image in pixels[:, 0, 0, 0]]
        self.batches.append((width, images))
        self.clock.spend(self.seconds(width, images))
        probabilities = np.full((len(images), self.num_classes), 0.1 / (self.num_classes - 1), np.float32)
        probabilities[range(len(images)), images] = 0.9
        return probabilities

    def memory_bytes(self) -> int:
        return 0

    def close(self) -> None: ...


def usual_seconds(width: Width, images: list[int]) -> float:
    """At full width 40 ms for one image and 20 ms for each further one."""
    return float(width) * 0.02 * (1 + len(images))
