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
    """The policy of a name: ``adaptive``, also at the one width of ``fixed:<width>``. Raises ValueError for others."""
    from server.policies.adaptive import Adaptive

    if name == "adaptive" or name.startswith("fixed:"):
        return Adaptive()
    raise ValueError(f"policy {name!r} does not exist; there are 'adaptive' and 'fixed:<width>'")


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
