"""What the server has seen of its load, as numbers. Pure: instants come in as arguments; reading the machine is
``machine.py``'s part."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from server.latency_profile import LatencyProfile
from server.types import SMALL_BYTES, Load

ARRIVALS_TAU_S = 0.5  # the width follows a burst, and forgets it within two seconds
BURST_TAU_S, BURST_SIGMAS = 0.1, 2.0  # or it follows within a tenth, if that is no chance
DEMAND_TAU_S = 15.0  # an autoscaler must not follow every burst
EVIDENCE_TAU_S = 1.0  # interference is forgotten at this pace when no batch runs, ...
LEAST_TAU_S = 10.0  # so is the best case of a delay, or a first one that was bad could keep every request out
DELAY_TAU_S = 0.25  # ... and a delay at this one: it may be what keeps every request out
# Batches weigh by the time they should take: a short one is made several times as long by a pause that a long one
# hardly feels. So much of the device's time weighs 1/e, ...
DEVICE_TAU_S = 0.1
MAX_WEIGHT = 0.5  # and no batch more than this
CALM = 1.1  # interference that may as well be the machine's own pace
SMOOTHING = 0.05
BEYOND, TAIL_STEP, MAX_TAIL = 0.02, 0.02, 3.0  # an online quantile: up for a batch that takes longer, else down, ...
TAIL_TAU_S = 60.0  # and forgotten at this pace when no batch runs
SHARE_TAU_S, USUAL_COUNT = 5.0, 10.0  # of shares; and what is usual counts as so many events


@dataclass(slots=True)
class DecayingRate:
    """Events per second, those ``tau_s`` ago weighing 1/e."""

    tau_s: float
    _value: float = 0.0
    _at: float = 0.0

    def add(self, amount: float, now: float) -> None:
        self._value = self.value(now) + amount / self.tau_s
        self._at = now

    def value(self, now: float) -> float:
        return self._value * math.exp(-max(0.0, now - self._at) / self.tau_s)


@dataclass(slots=True)
class Share:
    """In which share of events something is so; those of the last seconds weigh the most."""

    all: DecayingRate = field(default_factory=lambda: DecayingRate(SHARE_TAU_S))
    such: DecayingRate = field(default_factory=lambda: DecayingRate(SHARE_TAU_S))

    def add(self, so: bool, now: float) -> None:
        self.all.add(1.0, now)
        self.such.add(float(so), now)

    def value(self, now: float, usual: float) -> float:
        """``usual`` is the share that ten more events are taken to have had."""
        seen, so = (SHARE_TAU_S * rate.value(now) for rate in (self.all, self.such))
        return (so + usual * USUAL_COUNT) / (seen + USUAL_COUNT)


@dataclass(slots=True)
class Allowance:
    """Mean plus two mean deviations of a duration in seconds, smoothed as in RFC 6298, section 2.

    What is old counts less, both when it is read and when something new is seen: an estimate that makes the server
    refuse everybody must not wait for an answered request to be corrected.
    """

    mean_s: float = 0.0
    deviation_s: float = 0.0
    least_s: float = math.inf
    _at: float = 0.0

    def observe(self, seconds: float, now: float) -> None:
        kept = self._kept(now)
        self.deviation_s = kept * (self.deviation_s + (abs(seconds - self.mean_s) - self.deviation_s) / 4)
        self.mean_s = seconds + kept * 7 / 8 * (self.mean_s - seconds)
        self.least_s = min(seconds, self.least_s)
        self._at = now

    def value_s(self, now: float) -> float:
        return (self.mean_s + 2 * self.deviation_s) * self._kept(now)

    def best_s(self, now: float) -> float:
        """The least that was ever seen, or less when that is long ago; 0 before anything was."""
        return self.least_s * math.exp(-max(0.0, now - self._at) / LEAST_TAU_S) if self.least_s < math.inf else 0.0

    def _kept(self, now: float) -> float:
        return math.exp(-max(0.0, now - self._at) / DELAY_TAU_S)


@dataclass(slots=True)
class LoadMonitor:
    """Arrivals, the device's busy time, interference, and how long an image takes before and after the device."""

    arrivals: DecayingRate = field(default_factory=lambda: DecayingRate(ARRIVALS_TAU_S))
    burst: DecayingRate = field(default_factory=lambda: DecayingRate(BURST_TAU_S))
    demand: DecayingRate = field(default_factory=lambda: DecayingRate(DEMAND_TAU_S))
    busy: DecayingRate = field(default_factory=lambda: DecayingRate(1.0))
    small: Allowance = field(
        default_factory=Allowance
    )  # decoding an image in place, as those of few bytes are expected to be
    large: Allowance = field(default_factory=Allowance)  # decoding any other in a thread, its wait for one included
    hop: Allowance = field(default_factory=Allowance)  # that the device stands idle before a batch that waits for it
    notice: Allowance = field(default_factory=Allowance)  # from the engine's result to the event loop's hearing of it
    respond: Allowance = field(default_factory=Allowance)  # from the engine's result to the answer's first byte
    late: DecayingRate = field(default_factory=lambda: DecayingRate(SHARE_TAU_S))  # requests/s, the refused included
    narrow: DecayingRate = field(default_factory=lambda: DecayingRate(SHARE_TAU_S))  # see ``settled``
    promises: Share = field(default_factory=Share)  # of those of them that were not refused at once
    budgets_s: deque[float] = field(default_factory=lambda: deque(maxlen=500))
    expected_accuracy: float | None = None
    prediction_error: float = 1.0
    contention: float = 1.0  # slow-down that the machine's other processes explain, see ``see_machine``
    _interference: float = 1.0
    _interference_at: float = 0.0
    _tail: float = 1.0
    _tail_at: float = 0.0

    def arrived(self, images: int, budget_s: float, full_width_share: float, now: float) -> None:
        """``full_width_share``: device time of one image over that at full width; 1 unless a width is pinned."""
        self.arrivals.add(images, now)
        self.burst.add(images, now)
        self.demand.add(images * full_width_share, now)
        self.budgets_s.append(budget_s)

    def ran(
        self, observed_s: float, hop_s: float, notice_s: float, profiled_s: float, predicted_s: float, now: float
    ) -> None:
        """A batch took ``observed_s`` in the engine, which stood idle for ``hop_s`` before; ``notice_s`` later it was
        heard of. ``profiled_s`` is the idle machine's median, ``predicted_s`` what the decision said."""
        self.hop.observe(hop_s, now)
        self.notice.observe(notice_s, now)
        ratio = observed_s / profiled_s
        kept = math.exp(-profiled_s / DEVICE_TAU_S - max(0.0, now - self._interference_at) / EVIDENCE_TAU_S)
        # What neither the past nor this batch weighs is weighed by an idle machine: 1.
        self._interference = 1 + kept * (self._interference - 1) + min(MAX_WEIGHT, 1 - kept) * (ratio - 1)
        self._interference_at = now
        self.busy.add(observed_s, now)
        self._tail = min(MAX_TAIL, max(1.0, self.tail(now) * (1 + TAIL_STEP * ((observed_s > predicted_s) - BEYOND))))
        self._tail_at = now
        self.prediction_error += SMOOTHING * (observed_s / predicted_s - self.prediction_error)

    def answered(self, accuracy: float) -> None:
        before = accuracy if self.expected_accuracy is None else self.expected_accuracy
        self.expected_accuracy = before + SMOOTHING * (accuracy - before)

    def settled(self, worth: float | None, now: float) -> None:
        """A request with a budget is over. ``worth``: the accuracy that it was given over the best of its widths; None
        where it was not answered in time. ``narrow`` adds up what is missing to 1: requests, as ``late`` counts them.
        """
        self.late.add(float(worth is None), now)
        self.narrow.add(0.0 if worth is None else 1 - worth, now)

    def see_machine(self, others_cores: float, threads: int, cores: float, throttled: float = 0.0) -> None:
        """Other processes keep ``others_cores`` of the host's ``cores`` busy, our ``threads`` want to run as well, and
        in the share ``throttled`` of scheduling periods our quota was used up.

        Warns of interference before the first slow batch: n runnable threads on c cores run at most c / n as fast.
        """
        crowded = (others_cores + threads) / max(cores, threads)
        self.contention = max(1.0, crowded, 1 / (1 - min(throttled, 0.9)))

    def interference(self, now: float) -> float:
        """Observed over profiled latency, never below 1: where batches turn out faster, the profile follows them."""
        return max(self.slowdown(now), self.contention)

    def slowdown(self, now: float) -> float:
        """The part of it that batches have shown, without what the machine's load only suggests. At least 1."""
        return max(1.0, self._learned(now))

    def tail(self, now: float) -> float:
        """How many times the p99 must be longer for ``BEYOND`` of batches to exceed it. At least 1."""
        return 1 + (self._tail - 1) * math.exp(-max(0.0, now - self._tail_at) / TAIL_TAU_S)

    def calm(self, now: float) -> bool:
        """Whether the batches before took about what they should: what the next takes tells of the machine alone."""
        return self.slowdown(now) < CALM

    def least_overhead_s(self, now: float) -> float:
        """What an image costs beside the engine's time even when nobody else is there: the best case seen."""
        return sum(allowance.best_s(now) for allowance in (self.small, self.hop, self.respond))

    def decode(self, num_bytes: int) -> Allowance:
        """What is known of decoding bodies of this size."""
        return self.small if num_bytes <= SMALL_BYTES else self.large

    def arrival_rate(self, now: float) -> float:
        """Images/s: what the last half second shows, or more if the last tenth surely does."""
        burst = self.burst.value(now)
        chance = math.sqrt(burst / (2 * BURST_TAU_S))  # the standard deviation, were it a Poisson process
        return max(self.arrivals.value(now), burst - BURST_SIGMAS * chance)

    def load(self, now: float) -> Load:
        return Load(
            self.arrival_rate(now),
            self.interference(now),
            self.hop.value_s(now),
            self.respond.value_s(now),
            min(1.0, self.busy.value(now)),
            self.tail(now),
        )

    def median_budget_s(self) -> float:
        return median(self.budgets_s) if self.budgets_s else math.inf

    def _learned(self, now: float) -> float:
        return 1 + (self._interference - 1) * math.exp(-max(0.0, now - self._interference_at) / EVIDENCE_TAU_S)


def full_width_demand(monitor: LoadMonitor, profile: LatencyProfile, now: float) -> float:
    """Device time a second that all arrivals would need at full width: above 1 is more than one device.

    Smoothed as ``LoadMonitor.demand``; an image costs its share of the best batch whose p99 is at most half the median
    budget. 0 until the full width is ready.
    """
    widest = profile.widths[-1]
    if not profile.ready(widest):
        return 0.0
    per_image_s = profile.seconds_per_image(widest, monitor.median_budget_s() / 2)
    return monitor.demand.value(now) * per_image_s * monitor.interference(now)
