"""Policies: pure functions of (queue view, load, profile) -> decision. No clock, no I/O, no torch, no FastAPI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.types import Decision, Load, QueueView


class Policy(Protocol):
    """Which of the waiting images to run next, at which width. ``queue`` is not empty."""

    def __call__(self, queue: QueueView, load: Load, profile: LatencyProfile, now: float) -> Decision: ...


def policy_of(name: str) -> Policy:
    """A policy by its name; ``fixed:<width>`` is the adaptive one with a single width. Raises ValueError for others."""
    from server.policies.adaptive import Adaptive
    from server.policies.slackfit import slackfit
    from server.policies.threshold import Threshold

    match name.partition(":")[0]:
        case "adaptive" | "fixed":
            return Adaptive()
        case "slackfit":
            return slackfit
        case "threshold":
            return Threshold()
    raise ValueError(f"policy {name!r} does not exist; there are adaptive, fixed:<width>, slackfit and threshold")


def fixed_width(name: str, widths: Sequence[Width]) -> Width | None:
    """The width of ``fixed:<width>``, None for a policy that chooses. Raises ValueError unless it is in ``widths``."""
    kind, _, ratio = name.partition(":")
    if kind != "fixed":
        return None
    try:
        wanted = Width(ratio)
    except ValueError:
        wanted = None
    if wanted not in widths:
        raise ValueError(f"policy {name!r}: that width was not trained; trained widths: {', '.join(map(str, widths))}")
    return wanted
