"""A real server for the playground's tests: one image takes ``FULL_S`` at full width and its share of it at others.

Run as a module, by ``serving``. The class of an image is its first byte; two of the classes have hostile labels.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

from scala_model.checkpoint import Checkpoint
from scala_model.width import Width
from server import app
from server.lifecycle import run
from server.settings import Settings
from tests.unit.edge.application import QuietMachine
from tests.unit.fake_engine import FakeEngine
from tests.unit.toy import write_toy
from tests.unit.virtual_time import Clock

FULL_S = 0.2
HOSTILE_CLASS, HOSTILE_LABEL = (
    66,
    "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>",
)


class SleepingClock(Clock):
    def spend(self, seconds: float) -> None:
        time.sleep(seconds)


def seconds(width: Width, images: list[int]) -> float:
    return FULL_S * float(width)


def write_checkpoint(folder: Path) -> Path:
    """The toy checkpoint, one label of which is an attack."""
    path = write_toy(folder) / "config.json"
    card = json.loads(path.read_text())
    card["classes"][HOSTILE_CLASS]["label"] = HOSTILE_LABEL
    path.write_text(json.dumps(card))
    return folder


def engine_of(settings: Settings, checkpoint: Checkpoint, *given: Any) -> FakeEngine:
    engine = FakeEngine(SleepingClock(), max_batch=1)
    engine.seconds = seconds
    return engine


if __name__ == "__main__":
    # What else runs on this machine delays no sleeper, and shall not be taken for interference.
    with mock.patch.multiple(app, engine_of=engine_of, MachineReader=QuietMachine):
        run(Settings.load())
