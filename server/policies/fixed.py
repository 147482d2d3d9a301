"""The plain alternative: one width for all, batches as large as their deadlines allow. A yardstick for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.policies.adaptive import batch_at, goals_of, hopeless, usable
from server.types import Decision, Load, Waiting


@dataclass(frozen=True)
class Fixed:
    """Serves at ``width`` whatever the load; an item whose pin or floor forbids it gets the narrowest it allows."""

    width: Width

    def __call__(self, queue: Sequence[Waiting], load: Load, profile: LatencyProfile, now: float) -> Decision:
        shed = hopeless(queue, load, profile, now)
        alive = [i for i in range(len(queue)) if i not in shed]
        if not alive:
            return Decision(self.width, (), shed, 0.0, "late at every width")
        allowed = usable(queue[alive[0]].widths, profile)
        width = self.width if self.width in allowed else allowed[0]
        goals = goals_of(queue, load, profile, now)
        return batch_at(width, queue, alive, goals, shed, load, profile, now, "fixed")
