"""What a budget would buy now: the width that an image let in at this moment would meet, and its chance. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, deque
from copy import copy

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.load_monitor import Share
from server.policies import Policy
from server.policies.deadlines import fastest_of
from server.types import Load, QueueView

# Decisions that are foreseen: 0.1 to 0.6 ms of work with 250 waiting. More would bring quotes no nearer to what is then
# served, since that far ahead it is up to those who are yet to come.
MAX_STEPS = 4
MAX_OPEN = 100  # quotes whose request has not ended yet
CLOSE_S = 1.0  # from a quote to the arrival of a request that it may have been for
SAME_S = 1e-6  # budgets that differ by less are one
USUAL_KEPT = 0.99  # share of the requests that were let in which are answered in time, before anything was seen


class QuoteBook:
    """How true quotes are: each is held against the next request of its budget.

    Between the two others come and go, so that some that would have been let in are refused, and the other way round.
    """

    def __init__(self) -> None:
        self._open: deque[tuple[float, float, bool]] = deque(maxlen=MAX_OPEN)  # budget, instant, admitted
        self._shares = {True: Share(), False: Share()}

    def chance(self, admitted: bool, promises: Share, now: float) -> float:
        """That a request would be answered in time, where ``admitted`` says whether it would be let in at this moment.

        It is the share of such quotes before it, because nothing else was calibrated: how long batches take beside
        their medians tells little, as those that fail mostly give way to more urgent images that come later. Before
        there are quotes, it is the share of ``promises`` kept to those that were let in, and 0 for the others.
        """
        usual = promises.value(now, USUAL_KEPT) if admitted else 0.0
        return self._shares[admitted].value(now, usual)

    def given(self, budget_s: float, admitted: bool, now: float) -> None:
        self._open.append((budget_s, now, admitted))

    def ended(self, budget_s: float, arrival: float, in_time: bool, now: float) -> None:
        """A request of this budget that came at ``arrival`` is over."""
        for quote in self._open:
            if abs(quote[0] - budget_s) < SAME_S and 0 <= arrival - quote[1] < CLOSE_S:
                self._open.remove(quote)
                self._shares[quote[2]].add(in_time, now)
                return


def width_foreseen(
    due: float,
    widths: tuple[Width, ...],
    queue: QueueView,
    load: Load,
    profile: LatencyProfile,
    policy: Policy,
    *,
    starts_at: float,
) -> Width:
    """The width at which ``policy`` would run an image due at ``due`` if nobody else came, from ``starts_at`` on.

    Where the policy does not come to the image in four decisions, or would shed it, that is the last one's width or, if
    it is not one of ``widths``, the fastest of them; one must be on offer. Batches take their median. The policy
    itself, which may remember what it decides, does not notice.
    """
    policy, clock, place = copy(policy), starts_at, bisect_right(queue.due, due)
    instants, allowed, kinds = [*queue.due], [*queue.widths], Counter(queue.kinds)
    instants.insert(place, due)
    allowed.insert(place, widths)
    kinds[widths] += 1
    for _ in range(MAX_STEPS):
        decision = policy(QueueView(instants, allowed, kinds), load, profile, clock)
        if place in decision.batch or place in decision.shed:
            break
        if decision.batch:
            clock += load.hop_s + load.interference * profile.p50(decision.width, len(decision.batch))
        gone = sorted({*decision.batch, *decision.shed})
        kinds -= Counter(allowed[i] for i in gone)  # of which one without images is left out
        for i in reversed(gone):
            del instants[i], allowed[i]
        place -= bisect_left(gone, place)
    width = decision.width if decision.width in widths else fastest_of(widths, profile)
    assert width is not None, "or the image would not have been let in"
    return width
