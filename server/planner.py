"""Keeps the adaptive policy's plan true to what is warmed, measured and asked for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.load_monitor import LoadMonitor
from server.policies.adaptive import Adaptive
from server.policies.plan import Plan, make_plan

QUANTILES = (np.arange(16) + 0.5) / 16  # of the budgets
EVERY_S, SMOOTHING = 0.5, 0.3  # a plan takes 0.1 s: what passes within a second or two is not worth one
LATENCY_CHANGE, BUDGET_CHANGE, SLOWDOWN_CHANGE = 1.15, 1.3, 1.25  # times longer or shorter, and the plan is made anew
log = logging.getLogger("scala.serve")


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """``seconds[width]``: (images, seconds) of every batch on offer; ``accuracy`` of every width; see ``make_plan``."""

    seconds: tuple[tuple[tuple[int, float], ...], ...]
    accuracy: tuple[float, ...]
    budgets_s: tuple[float, ...]
    max_waiting: int
    slowdown: float

    def make(self) -> Plan:
        return make_plan(self.seconds, self.accuracy, self.budgets_s, self.max_waiting, self.slowdown)

    def resembles(self, other: PlanInputs) -> bool:
        """Whether the other's plan would do for these, too."""
        if [[batch for batch, _ in row] for row in self.seconds] != [[b for b, _ in row] for row in other.seconds]:
            return False
        times, before = ([s for row in inputs.seconds for _, s in row] for inputs in (self, other))
        return (
            _close(times, before, LATENCY_CHANGE)
            and _close(self.budgets_s, other.budgets_s, BUDGET_CHANGE)
            and _close([self.slowdown], [other.slowdown], SLOWDOWN_CHANGE)
        )


class Planner:
    """Plans for ``widths`` of the profile and the budgets that the monitor saw. ``told`` hears of every new plan."""

    def __init__(
        self,
        policy: Adaptive,
        profile: LatencyProfile,
        monitor: LoadMonitor,
        widths: Sequence[Width],
        default_budget_s: float,
        max_waiting: int,
        told: Callable[[PlanInputs], None] = lambda inputs: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy, self._profile, self._monitor, self._widths = policy, profile, monitor, widths
        self._default_budget_s, self._max_waiting, self._told = default_budget_s, max_waiting, told
        self._clock, self._slowdown = clock, 1.0
        self._inputs: PlanInputs | None = None

    def refresh(self) -> None:
        """Plan anew if the last plan's inputs do not hold any more: 0.1 s for 7 widths and 5 batch sizes."""
        if (inputs := self._news()) is not None:
            self._adopt(inputs, inputs.make())

    async def keep_fresh(self) -> None:
        """Until cancelled, beside the event loop."""
        while True:
            await asyncio.sleep(EVERY_S)
            if (inputs := self._news()) is not None:
                self._adopt(inputs, await asyncio.to_thread(inputs.make))

    def _news(self) -> PlanInputs | None:
        inputs = self._gathered()
        known = self._inputs is not None and inputs.resembles(self._inputs)
        return inputs if any(inputs.seconds) and not known else None

    def _adopt(self, inputs: PlanInputs, plan: Plan) -> None:
        self._inputs, self._policy.plan = inputs, plan
        self._told(inputs)
        log.debug("a new plan for %s", inputs)

    def _gathered(self) -> PlanInputs:
        self._slowdown += SMOOTHING * (self._monitor.load(self._clock()).interference - self._slowdown)
        rows = [self._profile.rows(w) if w in self._widths else () for w in self._profile.widths]
        budgets = list(self._monitor.budgets_s) or [self._default_budget_s]
        return PlanInputs(
            tuple(tuple((row.batch, row.p50_s) for row in cells) for cells in rows),
            tuple(self._profile.accuracy.values()),
            tuple(np.quantile(budgets, QUANTILES).tolist()),
            self._max_waiting,
            self._slowdown,
        )


def _close(values: Sequence[float], others: Sequence[float], factor: float) -> bool:
    return all(1 / factor < value / other < factor for value, other in zip(values, others, strict=True))
