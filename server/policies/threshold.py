"""Bands of utilisation with hysteresis, the controller that comes to mind first, as a yardstick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from server.latency_profile import LatencyProfile
from server.policies.adaptive import sort_out
from server.types import Decision, Load, QueueView

LOW, HIGH = 0.5, 0.8  # share of the time in which the engine runs
PERIOD_S = 0.5  # between two steps


class Memory(NamedTuple):
    """What is kept from one decision to the next: how many steps below the widest, and the instant of the next one."""

    below: int = 0
    next_step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Remembered(Decision):
    """A decision that depends on earlier ones, too: by ``memory``, as it was before."""

    memory: Memory


class Threshold:
    """One width down when the engine is busier than ``HIGH``, one up when less than ``LOW``; it begins at the widest.

    As many run as allow that width and can be in time. Where the head does not allow it, they run at the widest below
    that it does; if there is none, at its narrowest. ``memory`` may be replaced: a replay goes by the recorded one.
    """

    def __init__(self) -> None:
        self.memory = Memory()

    def __call__(self, queue: QueueView, load: Load, profile: LatencyProfile, now: float) -> Decision:
        alive, shed = sort_out(queue, load, profile, now)
        if not alive:
            return Decision(profile.fastest, (), shed, 0.0, "late at every width")
        before = self.memory
        if now >= before.next_step_s:
            self.memory = Memory(_step(before.below, load.busy, len(profile.widths)), now + PERIOD_S)
        allowed = [width for width in queue.widths[alive[0]] if profile.ready(width)]
        wanted = profile.widths[-1 - self.memory.below]
        width = max((w for w in allowed if w <= wanted), default=allowed[0])
        members = [i for i in alive if width in queue.widths[i]]
        start, size = now + load.hop_s + load.respond_s, 1
        for row in profile.rows(width):
            if row.batch <= len(members) and start + load.p99(row.p99_s) <= queue.due[members[0]]:
                size = row.batch
        return Remembered(width, members[:size], shed, load.p99(profile.p99(width, size)), "threshold", before)


def _step(below: int, busy: float, num_widths: int) -> int:
    if busy > HIGH:
        return min(below + 1, num_widths - 1)
    return max(below - 1, 0) if busy < LOW else below
