"""How Kubernetes chooses a number of replicas, as functions of numbers: no clock, no cluster.

Kubernetes: the HorizontalPodAutoscaler v2 as documented ("Horizontal Pod Autoscaling", kubernetes.io) and as its
controller computes it (pkg/controller/podautoscaler: replica_calculator.go, horizontal.go), which settles what the page
leaves open. Like there, metrics are whole thousandths of their unit. With KEDA the same controller follows a total, an
external metric that KEDA asks for anew at every look. A lost signal is not simulated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

SYNC_S = 15.0  # the controller looks so often
TOLERANCE = 0.1  # of a ratio to the target; what is within leaves the number as it is
CPU_WARM_UP_S = 300.0  # a pod that is younger counts for CPU only once a whole window was seen after it became ready
WINDOW_S = 15.0  # of a CPU sample


@dataclass(frozen=True, slots=True)
class Pod:
    """What the controller knows of a pod that is not being deleted.

    ``value`` in the metric's unit, None where no sample was taken. ``counts``: whether its sample is to be trusted; not
    that of a pod that is pending, nor, for CPU, of one that is not ready.
    """

    value: float | None
    counts: bool = True


def by_average(current: int, pods: Sequence[Pod], target: float) -> int:
    """Replicas that bring the average of a Pods metric, or of CPU utilisation, to ``target``.

    A pod without a sample counts as 0 where there would be more, as exactly the target where there would be fewer; one
    that does not count is 0 where there would be more. What turns the direction around leaves the number as it is, as
    does a total absence of samples. ``target`` is above 0.
    """
    aim = _thousandths(target)
    seen = [_thousandths(pod.value) for pod in pods if pod.counts and pod.value is not None]
    if not seen:
        return current
    num_missing, num_unready = sum(pod.counts for pod in pods) - len(seen), sum(not pod.counts for pod in pods)
    first = _ratio(seen, aim)
    if first <= 1:
        num_unready = 0
    if not num_missing and not num_unready:
        return current if _close(first) else math.ceil(first * len(seen))
    seen += [aim if first < 1 else 0] * num_missing + [0] * num_unready
    ratio = _ratio(seen, aim)
    wanted = math.ceil(ratio * len(seen))
    turned = (first - 1) * (ratio - 1) < 0 or (ratio - 1) * (wanted - current) < 0
    return current if _close(ratio) or turned else wanted


def by_total(current: int, total: float, target: float) -> int:
    """Replicas that share an external metric of type AverageValue so that each has ``target``, which is above 0."""
    value, aim = _thousandths(total), _thousandths(target)
    return current if current and _close(value / (aim * current)) else math.ceil(value / aim)


def _thousandths(value: float) -> int:
    return math.ceil(round(1000 * value, 6))


def _ratio(values: Sequence[int], aim: int) -> float:
    return sum(values) // len(values) / aim


def _close(ratio: float) -> bool:
    return abs(1 - ratio) <= TOLERANCE + 1e-12


# -- how fast it may change


@dataclass(frozen=True, slots=True)
class Step:
    """By how much the number may change within ``period_s``: so many pods, or so many percent of them."""

    value: int
    is_percent: bool = False
    period_s: float = 15.0

    def from_(self, replicas: int, sign: int) -> int:
        if not self.is_percent:
            return replicas + sign * self.value
        changed = replicas * (100 + sign * self.value) / 100
        return math.ceil(changed) if sign > 0 else int(changed)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """``spec.minReplicas``, ``maxReplicas`` and ``behavior``, with Kubernetes' defaults: of several steps the largest.

    A window makes the lowest recommendation that it holds count on the way up, the highest on the way down.
    """

    least: int = 1
    most: int = 10
    up: tuple[Step, ...] = (Step(4), Step(100, is_percent=True))
    down: tuple[Step, ...] = (Step(100, is_percent=True),)
    up_window_s: float = 0.0
    down_window_s: float = 300.0


@dataclass(slots=True)
class Autoscaler:
    """The number of replicas from one look to the next: windows and steps are applied to what metrics recommend."""

    behaviour: Behaviour = Behaviour()
    _recommended: list[tuple[float, int]] = field(default_factory=list)
    _changes: list[tuple[float, int]] = field(default_factory=list)

    def sync(self, now: float, current: int, recommendations: Sequence[int]) -> int:
        """The highest of the recommendations, one a metric, counts. Instants ascend from call to call.

        Without any, nothing changes. The first look takes ``current`` for what was recommended before.
        """
        if not recommendations:
            return current
        if not self._recommended:
            self._recommended.append((now, current))
        stable = self._stabilised(now, current, max(recommendations))
        allowed = min(max(stable, self.behaviour.least), self.behaviour.most)
        desired = self._limited(now, current, allowed)
        if desired != current:
            self._changes.append((now, desired - current))
        return desired

    def _stabilised(self, now: float, current: int, recommended: int) -> int:
        behaviour, up, down = self.behaviour, recommended, recommended
        for at, before in self._recommended:
            if at > now - behaviour.up_window_s:
                up = min(up, before)
            if at > now - behaviour.down_window_s:
                down = max(down, before)
        longest_s = max(behaviour.up_window_s, behaviour.down_window_s)
        self._recommended = [entry for entry in self._recommended if entry[0] > now - longest_s]
        self._recommended.append((now, recommended))
        return min(max(current, up), down)

    def _limited(self, now: float, current: int, wanted: int) -> int:
        sign = 1 if wanted > current else -1
        steps = self.behaviour.up if sign > 0 else self.behaviour.down
        reached = [
            step.from_(current - sum(by for at, by in self._changes if at > now - step.period_s), sign)
            for step in steps
        ]
        furthest = sign * max((sign * replicas for replicas in reached), default=sign * current)
        if sign * (furthest - current) <= 0:
            return current
        return min(wanted, furthest) if sign > 0 else max(wanted, furthest)
