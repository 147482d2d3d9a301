"""Our server with an engine that takes no time, so that all of a request's time is HTTP's, decoding included."""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from scala_model.checkpoint import Checkpoint
from scala_model.width import Width
from server import app
from server.engine import CPU_BATCH
from server.engine.contract import Engine
from server.lifecycle import run
from server.settings import Settings
from server.types import Probabilities


class InstantEngine:
    """Answers at once, and always the same."""

    name, device = "instant", "none"
    threads, max_batch = 1, CPU_BATCH

    def __init__(self, num_classes: int) -> None:
        scores = np.random.default_rng(0).random((self.max_batch, num_classes), np.float32)
        self._answer: Probabilities = scores / scores.sum(-1, keepdims=True)

    def load(self, width: Width, batch: int) -> None: ...

    def run(self, pixels: NDArray[np.uint8], width: Width) -> Probabilities:
        return self._answer[: len(pixels)]

    def memory_bytes(self) -> int:
        return 0

    def close(self) -> None: ...


def engine_of(settings: Settings, checkpoint: Checkpoint, cpus: float) -> Engine:
    return InstantEngine(checkpoint.config.num_classes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", required=True)
    app.engine_of = engine_of  # type: ignore[attr-defined]
    run(Settings.load({"port": parser.parse_args().port, "log_level": "warning"}))
