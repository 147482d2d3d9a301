"""The whole process stands still for seconds, as containers do that are paused and machines that are moved."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from server.bench.client import Client
from tests.chaos.callers import expect_punctual
from tests.chaos.conftest import Tally
from tests.chaos.load import FORESEEN
from tests.service.service_process import Running, serving

CALLERS, HALTS = 24, 4
HELD_S, BETWEEN_S = 2.5, 2.0  # the watchdog's patience is 2 s, and it may have begun at any time before
BUDGET_MS = 500


@dataclass
class Held:
    """What the callers heard of a server that stood still from time to time, all by the monotonic clock."""

    statuses: Counter[int] = field(default_factory=Counter)
    answered: list[tuple[float, float]] = field(default_factory=list)  # when each was sent, and when answered
    halts: list[tuple[float, float]] = field(default_factory=list)
    good_at: list[float] = field(default_factory=list)  # each answer of a class

    @property
    def lateness_ms(self) -> list[float]:
        """By how much each answer came after its budget, the time in which the server stood still left out."""
        return [
            1000 * (end - begin - sum(max(0.0, min(end, on) - max(begin, off)) for off, on in self.halts)) - BUDGET_MS
            for begin, end in self.answered
        ]

    @property
    def first_s(self) -> float:
        """From the end of a halt until the first good answer, at most."""
        return max(min(at - on for at in self.good_at if at > on) for _, on in self.halts)


async def held_still(server: Running, photos: list[bytes]) -> Held:
    held = Held()
    headers = {"X-Latency-Budget-Ms": f"{BUDGET_MS}", "X-Width": "1"}
    until = time.monotonic() + HALTS * (BETWEEN_S + HELD_S) + BETWEEN_S
    with closing(Client(server.port)) as client:

        async def caller(number: int) -> None:
            while time.monotonic() < until:
                reply = await client.classify(photos[number], headers)
                ended = time.monotonic()
                held.statuses[reply.status] += 1
                held.answered.append((ended - reply.latency_s, ended))
                if reply.status == 200:
                    held.good_at.append(ended)
                else:
                    await asyncio.sleep(0.05)

        callers = asyncio.gather(*(caller(number) for number in range(CALLERS)))
        for _ in range(HALTS):
            await asyncio.sleep(BETWEEN_S)
            server.process.send_signal(signal.SIGSTOP)
            stopped = time.monotonic()
            await asyncio.sleep(HELD_S)
            held.halts.append((stopped, time.monotonic()))
            server.process.send_signal(signal.SIGCONT)
        await callers
    return held


def test_a_process_that_was_held_still_goes_on(photos: list[bytes], tally: Tally, tmp_path: Path) -> None:
    """It takes no halt for a hang of its engine, ends those whose budget is over, and serves the others."""
    with serving(tmp_path / "log") as server:
        server.wait_ready()
        server.wait_until(lambda: "warmed" in (tmp_path / "log").read_text())
        held = asyncio.run(held_still(server, photos))
        assert server.process.poll() is None, (tmp_path / "log").read_text()
        assert server.http.get("/readyz").status_code == 200
    heard = held.statuses
    tally.requests(heard.total(), lost=sum(count for status, count in heard.items() if status not in FORESEEN))
    assert set(heard) <= {200, 429, 504}, heard
    assert heard[200] > heard[504]
    seen = (
        f"{heard[200]} answered, {heard[504]} ended at their deadline (504), {heard[429]} refused (429); latest answer "
        f"{max(held.lateness_ms):+.0f} ms from its budget of {BUDGET_MS} ms and the halt"
    )
    tally.fault(f"{HALTS} times the process is held still for {HELD_S:g} s", seen, held.first_s)
    expect_punctual(held.lateness_ms)
    assert held.first_s < BETWEEN_S
