"""A server on the embedded checkpoint whose engine does what a file says, from one batch to the next.

``python -m tests.chaos.faulty_server FILE``: settings come from the environment. SIGUSR1 blocks the event loop for half
a second, SIGUSR2 sets the wall clock a day back, and forth again. What takes minutes in a real server takes seconds.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scala_model.checkpoint import Checkpoint
from scala_model.width import Width
from server import app, engine, lifecycle, serve_loop
from server.engine.contract import DeviceLost, DeviceOutOfMemory, Engine
from server.settings import Settings
from server.types import Probabilities

RETRY_MEMORY_S, STANDSTILL_S, BLOCKED_S, DAY_S = 1.0, 3.0, 0.5, 86400.0
Run = Callable[[NDArray[np.uint8], Width], Probabilities]
holds_the_lock = ctypes.PyDLL(None)  # whose functions, unlike CDLL's, run without giving up the interpreter


class Faults:
    """``run`` in the place of an engine's. The file holds the name of a fault, and ``once`` if it is for one batch."""

    def __init__(self, path: Path, works: Run) -> None:
        self._path, self._works = path, works

    def run(self, pixels: NDArray[np.uint8], width: Width) -> Probabilities:
        name, _, once = self._path.read_text().partition(" ")
        if not name or not pixels.any():  # the images of the warm-up are black
            return self._works(pixels, width)
        if once:
            self._path.write_text("")
        spoilt: Probabilities = self._spoil(name, pixels, width)
        return spoilt

    def _spoil(self, name: str, pixels: NDArray[np.uint8], width: Width) -> Any:
        good: Any = self._works(pixels, width)
        match name:
            case "raises":
                raise RuntimeError("an illegal instruction was encountered")
            case "lost":
                raise DeviceLost("an illegal memory access was encountered")
            case "scarce" if len(pixels) > 1 or width > Width(0.5):
                raise DeviceOutOfMemory("out of memory")
            case "full":
                raise DeviceOutOfMemory("out of memory")
            case "hangs":
                time.sleep(3600)
            case "locks":
                holds_the_lock.sleep(3600)
            case "stalls":
                holds_the_lock.usleep(int(1e6 * BLOCKED_S))
            case "nan":
                return np.full_like(good, np.nan)
            case "unnormalised":
                return 2 * good
            case "negative":
                return 1 / good.shape[1] - (good - 1 / good.shape[1])
            case "narrow":
                return good[:, :-1] / good[:, :-1].sum(1, keepdims=True)
            case "short":
                return good[:-1]
        return good


def main(path: Path) -> None:
    engine_of, wall_clock, offset_s = engine.engine_of, time.time, 0.0

    def faulty(settings: Settings, checkpoint: Checkpoint, cpus: float) -> Engine:
        made = engine_of(settings, checkpoint, cpus)
        made.run = Faults(path, made.run).run  # type: ignore[method-assign]
        return made

    def step(*_: object) -> None:
        nonlocal offset_s
        offset_s = 0.0 if offset_s else -DAY_S

    app.engine_of = faulty  # type: ignore[attr-defined]
    serve_loop.RETRY_MEMORY_S, lifecycle.STANDSTILL_S = RETRY_MEMORY_S, STANDSTILL_S
    time.time = lambda: wall_clock() + offset_s
    time.time_ns = lambda: int(1e9 * time.time())
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(BLOCKED_S))
    signal.signal(signal.SIGUSR2, step)
    lifecycle.run(Settings.load({}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
