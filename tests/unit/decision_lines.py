"""Situations to record and replay, and a decision log written by hand.

The profile, p50 = p99, in ms of 1 and 2 images: width 0.25 (accuracy 0.5) 10 and 12, width 1 (accuracy 0.7) 40 and 48.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.load_monitor import LoadMonitor
from server.planner import PlanInputs, Planner
from server.policies.adaptive import Adaptive

NARROW, WIDE = Width(0.25), Width(1.0)
HEADER = {
    "format": 1,
    "model": "toy",
    "policy": "slackfit",
    "widths": [0.25, 1.0],
    "accuracies": [0.5, 0.7],
    "buckets": [1, 2],
    "started": "2026-01-01T00:00:00.000+00:00",
    "part": 1,
}
CELLS = [[0.25, 1, 0.010, 0.010], [1.0, 1, 0.040, 0.040], [0.25, 2, 0.012, 0.012], [1.0, 2, 0.048, 0.048]]
LOAD = {"arrival_rate": 0.0, "interference": 1.0, "hop_s": 0.0, "respond_s": 0.0, "busy": 0.0, "tail": 1.0}


def make_profile() -> LatencyProfile:
    profile = LatencyProfile({NARROW: 0.5, WIDE: 0.7}, 2)
    for width, bucket, p50_s, _ in CELLS:
        profile.record(Width(width), int(bucket), [p50_s] * 20)
    return profile


def plan_inputs() -> PlanInputs:
    """What a server of this profile plans from when nobody has come yet."""
    told: list[PlanInputs] = []
    profile = make_profile()
    Planner(Adaptive(), profile, LoadMonitor(), profile.widths, 0.1, 8, told.append).refresh(0.0)
    (inputs,) = told
    return inputs


def decided(due: list[float], width: float, batch: list[int], predicted_s: float, **more: Any) -> dict[str, Any]:
    """What was decided at the instant 0 about a queue of images that allow both widths."""
    told = {"now": 0.0, "load": LOAD, "due": due, "kinds": [[0.25, 1.0]], "width": width, "batch": batch, "shed": []}
    return {"decision": told | {"predicted_s": predicted_s, "reason": "slackfit"} | more}


def write_log(path: Path, *lines: Any, header: dict[str, Any] = HEADER, plan: Any = None) -> Path:
    """A file with header, profile and plan, and these lines behind them; text is written as it is."""
    everything = [{"header": header}, {"profile": CELLS}, {"plan": plan}, *lines]
    texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in everything]
    path.write_text("".join(texts))
    return path
