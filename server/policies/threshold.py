"""Bands of utilisation with hysteresis, the controller that comes to mind first, as a yardstick."""

from __future__ import annotations

from server.latency_profile import LatencyProfile
from server.policies.adaptive import sort_out
from server.types import Decision, Load, QueueView

LOW, HIGH = 0.5, 0.8  # share of the time in which the engine runs
PERIOD_S = 0.5  # between two steps


class Threshold:
    """One width down when the engine is busier than ``HIGH``, one up when less than ``LOW``; it begins at the widest.

    As many run as allow that width and can be in time. An image that does not allow it gets its own narrowest.
    """

    def __init__(self) -> None:
        self._below = 0  # steps from the widest
        self._next_step_s = 0.0

    def __call__(self, queue: QueueView, load: Load, profile: LatencyProfile, now: float) -> Decision:
        alive, shed = sort_out(queue, load, profile, now)
        if not alive:
            return Decision(profile.fastest, (), shed, 0.0, "late at every width")
        if now >= self._next_step_s:
            self._step(load.busy, len(profile.widths))
            self._next_step_s = now + PERIOD_S
        allowed = [width for width in queue.widths[alive[0]] if profile.ready(width)]
        wanted = profile.widths[-1 - self._below]
        width = max((w for w in allowed if w <= wanted), default=allowed[0])
        members = [i for i in alive if width in queue.widths[i]]
        start, size = now + load.hop_s + load.respond_s, 1
        for row in profile.rows(width):
            if row.batch <= len(members) and start + load.interference * row.p99_s <= queue.due[members[0]]:
                size = row.batch
        return Decision(width, members[:size], shed, load.interference * profile.p99(width, size), "threshold")

    def _step(self, busy: float, num_widths: int) -> None:
        if busy > HIGH:
            self._below = min(self._below + 1, num_widths - 1)
        elif busy < LOW:
            self._below = max(self._below - 1, 0)
