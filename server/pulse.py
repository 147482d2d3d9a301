"""Live numbers for whoever watches: one tick a second, made once for all of them, and the last two minutes of ticks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING

import prometheus_client

from server.schemas import Percentiles, Tick

if TYPE_CHECKING:
    from server.services import Services

EVERY_S, POLL_S = 1.0, 0.2  # a tick; and how soon a stream ends when the server leaves
KEPT = 120  # ticks for who begins to listen
RECENT_S, MAX_RECENT = 10.0, 1000  # answers of which percentiles tell, and the ticks that attainment is of
SETTLED = ("met", "missed", "shed", "expired", "failed")  # outcomes that attainment is a share of
log = logging.getLogger("scala.serve")


class Pulse:
    """The last ticks as server-sent events, and those who wait for the next. ``over`` when there will be none."""

    def __init__(self) -> None:
        self.listeners = 0
        self.over = False
        self._events: deque[str] = deque(maxlen=KEPT)
        self._next = asyncio.Event()
        self._answers: deque[tuple[float, float]] = deque(maxlen=MAX_RECENT)  # instant, seconds
        self._recent: deque[Counter[str]] = deque(maxlen=round(RECENT_S / EVERY_S))  # outcomes, a tick each
        self._outcomes, self._widths = Counter[str](), Counter[str]()  # up to the last tick

    def answered(self, seconds: float, now: float) -> None:
        """A request was answered so long after its head came in."""
        self._answers.append((now, seconds))

    async def keep(self, services: Services) -> None:
        """Tick until the server leaves or fails; the last tick says so."""
        last, lifecycle = time.monotonic(), services.lifecycle
        while not self.over:
            await asyncio.sleep(POLL_S)
            now = time.monotonic()
            self.over = lifecycle.draining or lifecycle.failed is not None
            if self.over or now - last >= EVERY_S - POLL_S / 2:
                try:
                    self._send(self._tick(services, now - last, now))
                except Exception:  # no chart is worth the server
                    log.exception("the live numbers cannot be told")
                last = now
        self._next.set()  # also where the last tick could not be told

    async def listen(self) -> AsyncGenerator[str, None]:
        """The ticks that there are, then each new one. Who reads too slowly misses some."""
        yield "".join(self._events)
        while not self.over:
            await self._next.wait()
            yield self._events[-1]

    def _send(self, tick: Tick) -> None:
        self._events.append(f"data: {tick.model_dump_json()}\n\n")
        self._next.set()
        self._next = asyncio.Event()

    def _tick(self, services: Services, seconds: float, now: float) -> Tick:
        outcomes = _counts(services.metrics.budget, "outcome")
        widths = _counts(services.metrics.width_selected, "width")
        self._recent.append(_difference(outcomes, self._outcomes))
        new_widths = _difference(widths, self._widths)
        self._outcomes, self._widths = outcomes, widths
        load, lifecycle = services.monitor.load(now), services.lifecycle
        return Tick(
            at=round(time.time(), 3),
            seconds=round(seconds, 3),
            state="ready" if lifecycle.ready else lifecycle.why_not_ready(),
            outcomes=dict(self._recent[-1]),
            widths=dict(new_widths),
            arrival_rate=round(load.arrival_rate, 2),
            queue_depth=len(services.queue),
            engine_busy_ratio=round(load.busy, 4),
            interference_ratio=round(load.interference, 4),
            full_width_demand_ratio=round(services.full_width_demand(), 4),
            latency_ms=self._latency_ms(now),
            attainment=self._attainment(),
            expected_accuracy_ratio=round(services.expected_accuracy(), 6),
            accuracy_debt_points=round(services.accuracy_debt(), 4),
        )

    def _latency_ms(self, now: float) -> Percentiles | None:
        ordered = sorted(1000 * seconds for at, seconds in self._answers if now - at < RECENT_S)
        if not ordered:
            return None
        p50, p99 = (round(ordered[int(share * (len(ordered) - 1))], 3) for share in (0.5, 0.99))
        return Percentiles(p50=p50, p99=p99)

    def _attainment(self) -> float | None:
        recent = sum(self._recent, Counter[str]())
        settled = sum(recent[outcome] for outcome in SETTLED)
        return round(recent["met"] / settled, 4) if settled else None


def _counts(counter: prometheus_client.Counter, label: str) -> Counter[str]:
    (family,) = counter.collect()
    return Counter(
        {sample.labels[label]: int(sample.value) for sample in family.samples if sample.name.endswith("_total")}
    )


def _difference(now: Mapping[str, int], before: Counter[str]) -> Counter[str]:
    """By key, zeros included."""
    return Counter({key: value - before[key] for key, value in now.items()})
