"""SlackFit, the policy of SuperServe (NSDI 2025), as a yardstick: fill the time that is left.

All pairs of width and batch size lie in buckets of latency, evenly spaced. The earliest deadline's slack chooses the
bucket closest below it, and of that bucket the largest batch is run, at its most accurate width.
"""

from __future__ import annotations

from server.latency_profile import LatencyProfile
from server.policies.adaptive import sort_out
from server.policies.deadlines import quickest_of
from server.types import Decision, Load, QueueView

BUCKETS = 16


def slackfit(queue: QueueView, load: Load, profile: LatencyProfile, now: float) -> Decision:
    """Those who join are the first in the queue that allow the width."""
    alive, shed = sort_out(queue, load, profile, now)
    if not alive:
        return Decision(profile.fastest, (), shed, 0.0, "late at every width")
    allowed = queue.widths[alive[0]]
    slack_s = queue.due[alive[0]] - (now + load.hop_s + load.respond_s)
    enough = next((size for size in profile.buckets if size >= len(alive)), profile.buckets[-1])
    pairs = [
        (load.p99(row.p99_s), row.batch, profile.accuracy[width], width)
        for width in allowed
        for row in profile.rows(width)
        if row.batch <= enough
    ]
    shortest_s, longest_s = min(pairs)[0], max(pairs)[0]
    step_s = (longest_s - shortest_s) / BUCKETS or 1.0
    fitting = [pair for pair in pairs if pair[0] <= slack_s]
    if fitting:
        bucket = max(int((pair[0] - shortest_s) / step_s) for pair in fitting)
        best = max(pair[1:] for pair in fitting if int((pair[0] - shortest_s) / step_s) == bucket)
        batch, width = best[0], best[2]
    else:
        quickest = quickest_of(allowed, profile)
        assert quickest is not None, "or the head would not be alive"
        batch, width = 1, quickest
    members = [i for i in alive if width in queue.widths[i]][:batch]
    return Decision(width, members, shed, load.p99(profile.p99(width, len(members))), "slackfit")
