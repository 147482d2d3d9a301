"""The plain alternative: one width for all, batches as large as their deadlines allow. A yardstick for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.policies.adaptive import batch_at, outlook
from server.types import Decision, Load, Waiting


@dataclass(frozen=True)
class Fixed:
    """Serves at ``width`` whatever the load; an image whose pin or floor forbids it gets the narrowest it allows."""

    width: Width

    def __call__(self, queue: Sequence[Waiting], load: Load, profile: LatencyProfile, now: float) -> Decision:
        view = outlook(queue, load, profile, now)
        if not view.alive:
            return Decision(self.width, (), view.shed, 0.0, "late at every width")
        allowed = [w for w in queue[view.alive[0]].widths if profile.ready(w)]
        width = self.width if self.width in allowed else allowed[0]
        return batch_at(width, [i for i in view.alive if width in queue[i].widths], view, "fixed")
