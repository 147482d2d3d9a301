"""``GET /v1/model``: what the profile says of each width, size by size."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.requests import Request

from scala_model.checkpoint import read_checkpoint
from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.routes.model import model
from server.schemas import ModelWidth
from tests.unit.toy import ACCURACIES, write_toy


@pytest.fixture
def profile() -> LatencyProfile:
    return LatencyProfile({Width(width): accuracy for width, accuracy in ACCURACIES.items()}, 4)


def widths(profile: LatencyProfile, folder: Path) -> dict[float, ModelWidth]:
    services = SimpleNamespace(
        checkpoint=read_checkpoint(write_toy(folder)),
        labels=("a",),
        profile=profile,
        settings=SimpleNamespace(model_name="toy"),
    )
    answer = asyncio.run(model(Request({"type": "http", "state": {"services": services}})))
    return {entry.width: entry for entry in answer.widths}


def test_a_width_is_dominated_where_it_is_so_at_every_batch_size_on_offer(
    profile: LatencyProfile, tmp_path: Path
) -> None:
    """At half width one image takes as long as at full, four do not; three quarters never pay, and are not warmed at
    four; the narrowest is not warmed at all."""
    for width, batch, seconds in (
        (0.5, 1, 0.010),
        (0.75, 1, 0.012),
        (1.0, 1, 0.010),
        (0.5, 2, 0.011),
        (0.75, 2, 0.020),
        (1.0, 2, 0.015),
        (0.5, 4, 0.012),
        (1.0, 4, 0.020),
    ):
        profile.record(Width(width), batch, [seconds])
    entries = widths(profile, tmp_path)
    told = {width: (entry.dominated, entry.dominated_at) for width, entry in entries.items()}
    assert told == {0.25: (False, []), 0.5: (False, [1]), 0.75: (True, [1, 2]), 1.0: (False, [])}
    assert {width: list(entry.latency_ms) for width, entry in entries.items()} == {
        0.25: [],
        0.5: ["1", "2", "4"],
        0.75: ["1", "2"],
        1.0: ["1", "2", "4"],
    }
    assert (entries[0.75].latency_ms["2"].p50, entries[0.75].latency_ms["2"].p99) == (20.0, 30.0)


def test_what_is_withdrawn_is_no_longer_told(profile: LatencyProfile, tmp_path: Path) -> None:
    for batch in (1, 2):
        profile.record(Width(1.0), batch, [0.01])
    profile.withdraw(Width(1.0), 2)
    assert list(widths(profile, tmp_path)[1.0].latency_ms) == ["1"]
