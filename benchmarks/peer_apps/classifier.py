"""What all of them serve: our decoder and our engine at one width, and the answer as data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from scala_model.checkpoint import read_checkpoint
from scala_model.width import Width
from server.cgroup import available_cpus
from server.decode import ImageDecoder
from server.engine import engine_of
from server.engine.contract import Engine
from server.settings import Settings
from server.types import Pixels, Probabilities

TOP_K = 5


@dataclass(frozen=True)
class Options:
    """``form`` is one of the ways to write it that the app's module knows, 0 workers or threads its default."""

    checkpoint: Path
    width: float
    port: int
    form: str
    max_batch: int
    batch_wait_ms: float
    workers: int
    threads: int | None

    @classmethod
    def parse(cls, arguments: Sequence[str] | None = None) -> Self:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--checkpoint", type=Path, required=True)
        parser.add_argument("--width", type=float, required=True)
        parser.add_argument("--port", type=int, required=True)
        parser.add_argument("--form", default="")
        parser.add_argument("--max-batch", type=int, default=16)
        parser.add_argument("--batch-wait-ms", type=float, default=0.0)
        parser.add_argument("--workers", type=int, default=1)
        parser.add_argument("--threads", type=int)
        return cls(**vars(parser.parse_args(arguments)))


class Classifier:
    """The engine is the one that the server would take here, loaded at one width and warm at every batch size."""

    def __init__(self, options: Options) -> None:
        checkpoint = read_checkpoint(options.checkpoint)
        settings = Settings.load({"num_threads": options.threads, "max_batch": options.max_batch})
        self._engine: Engine = engine_of(settings, checkpoint, available_cpus())
        self._width: Width = checkpoint.config.width(options.width)
        self._labels = tuple(str(entry["label"]) for entry in checkpoint.card["classes"])
        self._engine.load(self._width, self._engine.max_batch)
        size = checkpoint.config.image_size
        for batch in range(1, self._engine.max_batch + 1):
            self.run([np.zeros((size, size, 3), np.uint8)] * batch)
        self.decode = ImageDecoder(checkpoint.preprocessing, settings.max_pixels)

    def run(self, images: Sequence[Pixels]) -> Probabilities:
        return self._engine.run(np.stack(images), self._width)

    def answer(self, probabilities: NDArray[np.float32]) -> dict[str, Any]:
        best = np.argsort(-probabilities, kind="stable")[:TOP_K]
        return {
            "predictions": [
                {"class_id": int(i), "label": self._labels[i], "score": round(float(probabilities[i]), 6)} for i in best
            ],
            "width": float(self._width),
        }
