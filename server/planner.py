"""Keeps the adaptive policy's plan true to what is warmed, measured and asked for."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.load_monitor import LoadMonitor
from server.policies.adaptive import Adaptive
from server.policies.plan import Plan, make_plan

QUANTILES = (np.arange(16) + 0.5) / 16  # of the budgets
EVERY_S, PAUSE_S, SMOOTHING = 0.5, 2.0, 0.3  # what passes within a second or two is not worth a plan
PATIENCE_S = 60.0  # with a plan that takes half a second of a core
NICENESS = 10  # of planning: a tenth of a core that requests keep busy, and all of one that they leave
LEAST_BUDGET_S = 0.001
# Where lateness costs more right answers than narrow networks do, plans count on ever less of a budget; else, on more.
# A machine that stalls (a neighbour, a busy event loop) loses what a long queue leaves to luck.
LESS, MORE, LEAST_SHARE = 0.9, 1.1, 0.3
CHANCE = 1.0  # requests that may be late without a cause
LATENCY_CHANGE, BUDGET_CHANGE = 1.2, 1.3  # times longer or shorter, and the plan is made anew
log = logging.getLogger("scala.serve")


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """``seconds[width]``: (images, seconds) of every batch on offer; ``accuracy`` of every width; see ``make_plan``."""

    seconds: tuple[tuple[tuple[int, float], ...], ...]
    accuracy: tuple[float, ...]
    budgets_s: tuple[float, ...]
    max_waiting: int
    overhead_s: float

    def make(self) -> Plan:
        return make_plan(**asdict(self))

    async def make_beside(self) -> Plan:
        """In a process of its own, of low priority: work in a thread of ours would hold requests up for as long.

        It does not outlive this call. Raises OSError when there can be none, TimeoutError when it gets no time to run.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "server.planner"),  # -P: from our own path, never from the folder we are in
            stdin=PIPE,
            stdout=PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )
        try:
            async with asyncio.timeout(PATIENCE_S):
                written, _ = await process.communicate(json.dumps(asdict(self)).encode())
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise OSError(f"the planning process ended with exit code {process.returncode}")
        return Plan.read(io.BytesIO(written))

    def resembles(self, other: PlanInputs) -> bool:
        """Whether the other's plan would do for these, too."""
        if [[batch for batch, _ in row] for row in self.seconds] != [[b for b, _ in row] for row in other.seconds]:
            return False
        return _close(self._times_s(), other._times_s(), LATENCY_CHANGE) and _close(
            self.budgets_s, other.budgets_s, BUDGET_CHANGE
        )

    def _times_s(self) -> list[float]:
        return [s + self.overhead_s for row in self.seconds for _, s in row]


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
        told: Callable[[PlanInputs], None] | None = None,
    ) -> None:
        self._policy, self._profile, self._monitor, self._widths = policy, profile, monitor, widths
        self._default_budget_s, self._max_waiting, self._told = default_budget_s, max_waiting, told
        self._overhead_s = self._respond_s = 0.0
        self._share = 1.0  # of a budget that is counted on
        self._inputs: PlanInputs | None = None

    def refresh(self, now: float) -> None:
        """Plan anew if the last plan's inputs do not hold any more: half a second for 7 widths and 5 batch sizes."""
        if (inputs := self._news(now)) is not None:
            self._adopt(inputs, inputs.make())

    async def keep_fresh(self) -> None:
        """Until cancelled, beside the event loop."""
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                if (inputs := self._news(time.monotonic())) is None:
                    continue
                self._adopt(inputs, await self._made(inputs))
            except Exception:  # an old plan serves; no plan is worth the server
                log.exception("no new plan could be made: going on with the last")
            await asyncio.sleep(PAUSE_S)

    async def _made(self, inputs: PlanInputs) -> Plan:
        try:
            return await inputs.make_beside()
        except TimeoutError:  # of those that are to be seen as errors of the system, too
            raise
        except OSError as error:
            log.warning("no plan from another process: %s", error)
            return await asyncio.to_thread(inputs.make)

    def _news(self, now: float) -> PlanInputs | None:
        inputs = self._gathered(now)
        known = self._inputs is not None and inputs.resembles(self._inputs)
        return inputs if any(inputs.seconds) and not known else None

    def _adopt(self, inputs: PlanInputs, plan: Plan) -> None:
        self._inputs, self._policy.plan = inputs, plan
        if self._told is not None:
            self._told(inputs)
        log.debug("a new plan for %s", inputs)

    def _gathered(self, now: float) -> PlanInputs:
        monitor = self._monitor
        self._overhead_s += SMOOTHING * (monitor.hop.mean_s - self._overhead_s)
        self._respond_s += SMOOTHING * (monitor.respond.mean_s - self._respond_s)
        late, narrow = (rate.tau_s * rate.value(now) for rate in (monitor.late, monitor.narrow))
        self._share = max(LEAST_SHARE, LESS * self._share) if late > narrow + CHANCE else min(1.0, MORE * self._share)
        rows = [self._profile.rows(w) if w in self._widths else () for w in self._profile.widths]
        budgets = self._share * np.array(monitor.budgets_s or [self._default_budget_s]) - self._respond_s
        return PlanInputs(
            tuple(tuple((row.batch, row.p50_s) for row in cells) for cells in rows),
            tuple(self._profile.accuracy.values()),
            tuple(np.quantile(budgets, QUANTILES).clip(LEAST_BUDGET_S).tolist()),
            self._max_waiting,
            self._overhead_s,
        )


def main() -> None:
    """From inputs on standard input to a plan on standard output."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    plan = PlanInputs(**json.load(sys.stdin)).make()
    try:
        plan.write(sys.stdout.buffer)
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # the server is gone
        os._exit(1)


def _close(values: Sequence[float], others: Sequence[float], factor: float) -> bool:
    return all(1 / factor < value / other < factor for value, other in zip(values, others, strict=True))


if __name__ == "__main__":
    main()
