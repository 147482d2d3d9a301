"""Policies: pure functions of (queue view, load, profile) -> decision. No clock, no I/O, no torch, no FastAPI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.types import Decision, Load, Waiting


class Policy(Protocol):
    """Which of the waiting images to run next, at which width. ``queue`` is ordered by ``order_by`` and not empty."""

    def __call__(self, queue: Sequence[Waiting], load: Load, profile: LatencyProfile, now: float) -> Decision: ...


def policy_of(name: str, widths: Sequence[Width]) -> Policy:
    """The policy of a name: ``adaptive`` or ``fixed:<width>``.

    Raises ValueError for an unknown name or a width that is not one of ``widths``.
    """
    from server.policies.adaptive import adaptive
    from server.policies.fixed import Fixed

    if name == "adaptive":
        return adaptive
    kind, _, ratio = name.partition(":")
    if kind != "fixed":
        raise ValueError(f"policy {name!r} does not exist; there are 'adaptive' and 'fixed:<width>'")
    width = next((w for w in widths if str(w) == ratio or float(w) == float(ratio)), None)
    if width is None:
        raise ValueError(f"policy {name!r}: that width was not trained; trained widths: {', '.join(map(str, widths))}")
    return Fixed(width)
