"""What the tests of the HTTP contract share."""

from __future__ import annotations

import pytest

from scala_model.checkpoint import Checkpoint, read_checkpoint
from tests.unit.edge.application import Runner
from tests.unit.toy import write_toy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return read_checkpoint(write_toy(tmp_path_factory.mktemp("checkpoints") / "toy"))


@pytest.fixture
def site(checkpoint: Checkpoint) -> Runner:
    return Runner(checkpoint)
